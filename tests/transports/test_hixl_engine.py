# SPDX-License-Identifier: Apache-2.0
"""What the `hixl` transport registers with HIXL, and how it starts it."""

from __future__ import annotations

import pytest
import torch

from llm_datadist_torch import LLMParamError, LLMRole
from llm_datadist_torch.config import EngineConfig
from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.transports.hixl.engine import _free_addresses, _options
from tests.transports.fake_hixl import MemType
from tests.transports.hixl_rig import BASE, META, PARAM_INVALID, SIZE


def test_registered_once_however_often(rig):
    span = MemorySpan(BASE * 2, 4096, torch.device("cpu"))
    rig.memory.add(span)
    rig.memory.add(span)
    assert rig.script.calls == [("register_mem", (BASE * 2, 4096), MemType.MEM_HOST)]
    rig.memory.remove(span)
    assert rig.memory.cover(torch.tensor([BASE * 2]), 4096)
    rig.memory.remove(span)
    assert rig.count("deregister_mem") == 1
    assert not rig.memory.cover(torch.tensor([BASE * 2]), 1)
    rig.memory.remove(span)
    assert rig.count("deregister_mem") == 1


def test_memory_inside_registered_memory(rig):
    inner = MemorySpan(BASE + 4096, 4096, META)
    rig.memory.add(inner)
    assert rig.count("register_mem") == 0
    rig.memory.remove(MemorySpan(BASE, SIZE, META))
    assert rig.count("deregister_mem") == 0
    assert rig.memory.cover(torch.tensor([inner.address]), inner.nbytes)
    rig.memory.remove(inner)
    assert rig.count("deregister_mem") == 1
    rig.memory.add(MemorySpan(BASE + 4096, 4096, torch.device("cpu")))
    assert rig.script.calls[-1][2] is MemType.MEM_HOST


def test_a_refused_registration_changes_nothing(rig):
    rig.script.then("register_mem", (PARAM_INVALID, 0))
    span = MemorySpan(BASE * 2, 4096, META)
    with pytest.raises(LLMParamError, match=r"register 4096 bytes of meta memory.*2 MiB"):
        rig.memory.add(span)
    assert not rig.memory.cover(torch.tensor([span.address]), 1)
    rig.memory.remove(span)
    assert rig.count("deregister_mem") == 0


def test_coverage(rig):
    rig.memory.add(MemorySpan(BASE + 2 * SIZE, SIZE, META))
    cover = rig.memory.cover
    assert cover(torch.tensor([BASE, BASE + 2 * SIZE]), SIZE)
    assert not cover(torch.tensor([BASE, BASE + SIZE]), 1)
    assert not cover(torch.tensor([BASE + 1]), SIZE)
    assert not cover(torch.tensor([BASE - 1]), 1)
    rig.memory.clear()
    assert not cover(torch.tensor([BASE]), 1)


def test_options_are_passed_on():
    class Keys:
        OPTION_LOCAL_COMM_RES = "LocalCommRes"
        OPTION_GLOBAL_RESOURCE_CONFIG = "GlobalResourceConfig"
        OPTION_RDMA_TRAFFIC_CLASS = "RdmaTrafficClass"
        OPTION_RDMA_SERVICE_LEVEL = "RdmaServiceLevel"
        OPTION_BUFFER_POOL = "BufferPool"

    assert _options(Keys, EngineConfig(LLMRole.MIX)) == {"BufferPool": "0:0"}
    config = EngineConfig(
        LLMRole.MIX,
        local_comm_res="",
        global_resource_config='{"a": 1}',
        rdma_traffic_class=132,
        rdma_service_level=0,
    )
    assert _options(Keys, config) == {
        "BufferPool": "0:0",
        "LocalCommRes": "",
        "GlobalResourceConfig": '{"a": 1}',
        "RdmaTrafficClass": "132",
        "RdmaServiceLevel": "0",
    }


def test_addresses_for_the_engine():
    address = next(_free_addresses("127.0.0.1", 0))
    host, _, port = address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    near = next(_free_addresses("127.0.0.1", int(port)))
    assert int(port) < int(near.rpartition(":")[2]) <= int(port) + 64


@pytest.mark.needs_ipv6
def test_an_ipv6_address_for_the_engine():
    assert next(_free_addresses("::1", 0)).startswith("[::1]:")

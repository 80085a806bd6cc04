# SPDX-License-Identifier: Apache-2.0
"""What the `hixl` transport registers with HIXL, and how it starts it."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from llm_datadist_torch import LLMException, LLMParamError, LLMRole
from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.transports.hixl.engine import _address_of, _free_addresses, _options
from llm_datadist_torch.transports.hixl.ports import AUTO_CONNECT, CLIENT_SERVER_COMM
from llm_datadist_torch.values.config import EngineConfig
from tests.transports.fake_hixl import MemType
from tests.transports.hixl_rig import BASE, FAILED, META, PARAM_INVALID, SIZE


class Kept:
    """What owns memory."""


def covers(rig, addresses, nbytes):
    return rig.memory.table.generation_of(torch.tensor(addresses), nbytes) is not None


def test_registered_once_however_often(rig):
    span = MemorySpan(BASE * 2, 4096, torch.device("cpu"))
    rig.memory.add(span)
    rig.memory.add(span)
    assert rig.script.calls == [("register_mem", (BASE * 2, 4096), MemType.MEM_HOST)]
    rig.memory.remove(span)
    assert covers(rig, [BASE * 2], 4096)
    assert rig.memory.remove(span)
    assert rig.memory.deregister_unused()
    assert rig.count("deregister_mem") == 1
    assert not covers(rig, [BASE * 2], 1)
    assert not rig.memory.remove(span)
    assert rig.count("deregister_mem") == 1


def test_memory_inside_registered_memory(rig):
    inner = MemorySpan(BASE + 4096, 4096, META)
    rig.memory.add(inner)
    assert rig.count("register_mem") == 0
    rig.memory.remove(MemorySpan(BASE, SIZE, META))
    assert rig.count("deregister_mem") == 0
    assert covers(rig, [inner.address], inner.nbytes)
    assert rig.memory.remove(inner)
    assert rig.memory.deregister_unused()
    assert rig.count("deregister_mem") == 1
    rig.memory.add(MemorySpan(BASE + 4096, 4096, torch.device("cpu")))
    assert rig.script.calls[-1][2] is MemType.MEM_HOST


def test_a_refused_registration_changes_nothing(rig):
    rig.script.then("register_mem", (PARAM_INVALID, 0))
    span = MemorySpan(BASE * 2, 4096, META)
    with pytest.raises(LLMParamError, match=r"register 4096 bytes of device memory.*2 MiB"):
        rig.memory.add(span)
    assert not covers(rig, [span.address], 1)
    rig.memory.remove(span)
    assert rig.count("deregister_mem") == 0


def test_coverage(rig):
    rig.memory.add(MemorySpan(BASE + 2 * SIZE, SIZE, META))
    assert covers(rig, [BASE, BASE + 2 * SIZE], SIZE)
    assert not covers(rig, [BASE, BASE + SIZE], 1)
    assert not covers(rig, [BASE + 1], SIZE)
    assert not covers(rig, [BASE - 1], 1)
    rig.memory.clear()
    assert not covers(rig, [BASE], 1)


def test_what_is_in_use_somewhere_stays_registered_and_alive(rig):
    """HIXL deregisters nothing while somebody is connected."""
    span = MemorySpan(BASE, SIZE, META)
    rig.script.then("deregister_mem", *[FAILED] * 2)
    owner = Kept()
    alive = weakref.ref(owner)
    assert rig.memory.remove(span, owner)
    del owner
    assert not rig.memory.deregister_unused()
    assert alive() is not None
    assert covers(rig, [BASE], SIZE)
    # Wanted again meanwhile: nothing needs to be done, and its new user keeps it.
    assert rig.memory.add(span) == []
    assert alive() is None
    assert rig.memory.remove(span, Kept())
    assert not rig.memory.deregister_unused()
    assert rig.memory.deregister_unused()
    assert not covers(rig, [BASE], 1)
    assert rig.count("register_mem") == 0
    assert rig.count("deregister_mem") == 3


def test_a_storage_is_registered_once(rig):
    whole = (BASE * 2, 4 * SIZE)
    first = MemorySpan(BASE * 2, SIZE, META, whole)
    second = MemorySpan(BASE * 2 + SIZE, SIZE, META, whole)
    assert rig.memory.add(first) == [(*whole, 2)]
    assert rig.memory.add(second) == []
    assert rig.memory.generation == 2
    assert covers(rig, [BASE * 2], 4 * SIZE)
    # Torch may have moved the tensor to another storage since.
    assert not rig.memory.remove(first._replace(storage=None))
    assert rig.memory.remove(second)


def test_a_storage_that_is_too_much_for_hixl(rig):
    rig.script.then("register_mem", (FAILED, 0))
    span = MemorySpan(BASE * 2, 4096, META, (BASE * 2, 1 << 50))
    assert rig.memory.add(span) == [(BASE * 2, 4096, 2)]


def test_memory_around_registered_memory_replaces_it(rig):
    around = MemorySpan(BASE - 4096, SIZE + 8192, META)
    assert rig.memory.add(around) == [(around.address, around.nbytes, 2)]
    assert [call[0] for call in rig.script.calls] == ["deregister_mem", "register_mem"]
    assert not rig.memory.remove(MemorySpan(BASE, SIZE, META))
    assert covers(rig, [BASE - 4096], SIZE + 8192)
    assert rig.memory.remove(around)
    assert rig.memory.deregister_unused()
    assert not covers(rig, [BASE], 1)


def test_memory_around_memory_that_stays_registered_is_refused(rig):
    rig.script.then("deregister_mem", *[FAILED] * 10)
    with pytest.raises(LLMException, match="replace the registration"):
        rig.memory.add(MemorySpan(BASE - 4096, SIZE + 8192, META))
    assert covers(rig, [BASE], SIZE)
    assert not covers(rig, [BASE - 4096], 1)


def test_options_are_passed_on():
    port = SimpleNamespace(supports=lambda feature: False)
    assert _options(port, EngineConfig(LLMRole.MIX)) == [{"BufferPool": "0:0"}]
    port.supports = lambda feature: feature in {AUTO_CONNECT, CLIENT_SERVER_COMM}
    assert _options(port, EngineConfig(LLMRole.MIX)) == [
        {"BufferPool": "0:0", "LocalCommRes": '{"version": "1.3"}', "AutoConnect": "1"},
        {"BufferPool": "0:0"},
    ]
    config = EngineConfig(
        LLMRole.MIX,
        local_comm_res="",
        global_resource_config='{"a": 1}',
        rdma_traffic_class=132,
        rdma_service_level=0,
    )
    assert _options(port, config)[0] == {
        "AutoConnect": "1",
        "BufferPool": "0:0",
        "LocalCommRes": "",
        "GlobalResourceConfig": '{"a": 1}',
        "RdmaTrafficClass": "132",
        "RdmaServiceLevel": "0",
    }


def test_addresses_for_the_engine():
    host, _, port = next(_free_addresses("127.0.0.1")).rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert next(_free_addresses("192.0.2.7"), None) is None


def test_where_the_engine_listens():
    def address_for(listen):
        return _address_of(EngineConfig(LLMRole.MIX, listen=listen))

    assert address_for(("10.1.2.3", 26000)) == "10.1.2.3"
    own = address_for(None)
    assert own not in ("", "0.0.0.0")
    assert address_for(("0.0.0.0", 26000)) == address_for(("::", 0)) == own
    assert next(_free_addresses(own)).startswith(f"{own}:")


@pytest.mark.needs_ipv6
def test_an_ipv6_address_for_the_engine():
    assert next(_free_addresses("::1")).startswith("[::1]:")

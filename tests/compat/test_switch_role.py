# SPDX-License-Identifier: Apache-2.0
"""switch_role and remap_registered_memory (reference API, 11.3 and 9.5)."""

from __future__ import annotations

import socket

import pytest

from llm_datadist_torch import (
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMParamError,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
)
from tests.compat.programs import free_ports
from tests.peers import eventually

LISTEN = "llm.listenIpInfo"


def link(asker: LLMDataDist, listener: LLMDataDist) -> LLMStatusCode:
    info = LLMClusterInfo()
    info.remote_cluster_id = listener.cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(*listener.listen_address)
    return asker.link_clusters([info])[0]


def answers(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("role", "options", "error"),
    [
        (1, None, TypeError),
        (None, None, KeyError),
        (LLMRole.DECODER, [], TypeError),
        (LLMRole.DECODER, {LISTEN: "nonsense"}, LLMParamError),
        (LLMRole.DECODER, {LISTEN: "127.0.0.1:x"}, ValueError),
        (LLMRole.DECODER, {LISTEN: "999.1.1.1:0"}, LLMParamError),
    ],
)
def test_bad_arguments_change_nothing(instance_factory, role, options, error):
    datadist = instance_factory()
    before = datadist.listen_address
    with pytest.raises(error):
        datadist.switch_role(role, options)
    assert datadist.listen_address == before
    assert answers(before[1])


def test_needs_init():
    with pytest.raises(RuntimeError):
        LLMDataDist(LLMRole.PROMPT, 1).switch_role(LLMRole.DECODER)


def test_without_an_address_it_listens_no_more(instance_factory):
    datadist = instance_factory()
    port = datadist.listen_address[1]
    datadist.switch_role(LLMRole.DECODER)
    assert datadist.listen_address is None
    assert eventually(lambda: not answers(port))


def test_it_listens_at_the_new_address_and_can_be_linked(instance_factory):
    datadist, peer = instance_factory(), instance_factory()
    old = datadist.listen_address[1]
    (new,) = free_ports(1)
    datadist.switch_role(LLMRole.DECODER, {LISTEN: f"127.0.0.1:{new}", "llm.Other": "ignored"})
    assert datadist.listen_address == ("127.0.0.1", new)
    assert eventually(lambda: not answers(old))
    assert link(peer, datadist) == LLMStatusCode.LLM_SUCCESS


def test_another_address_with_the_same_port(instance_factory):
    """The reference keeps the old address (section 14, 52)."""
    datadist = instance_factory()
    port = datadist.listen_address[1]
    datadist.switch_role(LLMRole.MIX, {LISTEN: f"127.0.0.2:{port}"})
    assert datadist.listen_address == ("127.0.0.2", port)
    assert answers(port, "127.0.0.2")
    assert eventually(lambda: not answers(port))


def test_a_busy_port_leaves_the_old_listener(instance_factory):
    datadist = instance_factory()
    before = datadist.listen_address
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(LLMException) as caught:
        datadist.switch_role(LLMRole.DECODER, {LISTEN: f"127.0.0.1:{busy.getsockname()[1]}"})
    assert caught.value.status_code == LLMStatusCode.LLM_FAILED
    assert datadist.listen_address == before
    assert answers(before[1])


def test_links_stand_in_the_way(instance_factory):
    datadist, peer = instance_factory(), instance_factory()
    assert link(peer, datadist) == LLMStatusCode.LLM_SUCCESS
    for linked in (datadist, peer):
        with pytest.raises(LLMException) as caught:
            linked.switch_role(LLMRole.DECODER)
        assert caught.value.status_code == LLMStatusCode.LLM_EXIST_LINK


MEMORY = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 4096)


@pytest.mark.parametrize(
    "given",
    [
        None,
        "text",
        (MEMORY,),
        [1],
        [],
        MemInfo(Memtype.MEM_TYPE_HOST, 4096, 4096),
        [MEMORY, MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 4096)],
        MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 0),
    ],
    ids=repr,
)
def test_remap_refuses(instance_factory, given):
    with pytest.raises(LLMParamError):
        instance_factory().cache_manager.remap_registered_memory(given)


def test_remap_needs_a_link_and_then_has_nothing_to_do(instance_factory):
    datadist, peer = instance_factory(), instance_factory()
    with pytest.raises(LLMException) as caught:
        datadist.cache_manager.remap_registered_memory(MEMORY)
    assert caught.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK
    assert link(datadist, peer) == LLMStatusCode.LLM_SUCCESS
    datadist.cache_manager.remap_registered_memory([MEMORY])

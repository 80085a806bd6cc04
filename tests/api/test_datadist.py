# SPDX-License-Identifier: Apache-2.0
"""LLMDataDist's life: construct, init, finalize, exit (reference API, 6.1 to 6.4)."""

from __future__ import annotations

import errno
import gc
import json
import sys
import threading
from pathlib import Path

import pytest

from llm_datadist_torch import (
    CacheManager,
    LLMDataDist,
    LLMException,
    LLMRole,
)
from llm_datadist_torch.links.handshake import Handshake
from llm_datadist_torch.net.loop import Loop
from llm_datadist_torch.net.strangers import Strangers
from llm_datadist_torch.transports.hixl.native import NativeLibrary
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.values.status import LLMStatusCode
from tests.api.support import (
    FAILED,
    OOM,
    PI,
    address_of,
    desc,
    raises,
)
from tests.conftest import make_options
from tests.peers import eventually


@pytest.mark.parametrize("part", [Loop, Strangers, Handshake])
def test_init_without_sockets_leaves_nothing(part, monkeypatch):
    """Whatever can't be had on the way: what has been opened before is closed again."""
    closed = []
    secret = {"llm.LinkSecret": "correct horse battery staple"}
    datadist = LLMDataDist(LLMRole.PROMPT, 1)

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    def descriptors():
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(LocalTransport, "close", lambda _: closed.append("local"))
        patch.setattr(part, "__init__", fail)
        with pytest.raises((LLMException, OSError), match="Too many open files"):
            datadist.init(make_options() | secret)
    assert closed == ["local"]
    assert eventually(lambda: descriptors() == before)
    datadist.init(make_options() | secret)
    datadist.finalize()


# -- constructor (6.1) ----------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(LLMRole))
@pytest.mark.parametrize("cluster_id", [0, 1, 2**64 - 1])
def test_constructor_takes_roles_and_uint64(role, cluster_id):
    datadist = LLMDataDist(role, cluster_id)
    assert datadist.cluster_id == cluster_id
    assert "not initialised" in repr(datadist)


@pytest.mark.parametrize(
    ("role", "cluster_id", "fault"),
    [
        (1, 1, TypeError),
        ("Prompt", 1, TypeError),
        (1, -1, TypeError),  # role is looked at first
        (LLMRole.PROMPT, "1", TypeError),
        (LLMRole.PROMPT, None, TypeError),
        (LLMRole.PROMPT, 1.0, TypeError),
        (LLMRole.PROMPT, -1, ValueError),
        (LLMRole.PROMPT, 2**64, ValueError),
    ],
)
def test_constructor_refuses(role, cluster_id, fault):
    with raises(fault):
        LLMDataDist(role, cluster_id)


def test_role_none_is_a_key_error_in_init():
    datadist = LLMDataDist(None, 1)
    with pytest.raises(KeyError):
        datadist.init(make_options())


@pytest.mark.parametrize(
    ("role", "text"),
    [(LLMRole.PROMPT, "Prompt"), (LLMRole.DECODER, "Decoder"), (LLMRole.MIX, "Mix")],
)
def test_role_to_str(role, text):
    assert LLMDataDist._role_to_str(role) == text


# -- init (6.2, in order) -------------------------------------------------------------------------


def test_repeated_init_is_silent_and_ignores_options(instance_factory):
    datadist = instance_factory()
    manager, address = datadist.cache_manager, datadist.listen_address
    for ignored in ({}, None, "nonsense", {"llm.EnableCacheManager": "7"}):
        datadist.init(ignored)
    assert datadist.cache_manager is manager
    assert datadist.listen_address == address


def test_several_instances_in_one_process(instance_factory):
    """Deviation from 6.2, step 2: the reference allows one."""
    one, other = instance_factory(), instance_factory()
    assert one.listen_address != other.listen_address
    a = one.cache_manager.allocate_cache(desc())
    b = other.cache_manager.allocate_cache(desc())
    assert (a.cache_id, b.cache_id) == (1, 1)
    one.finalize()
    assert a.tensor_addrs == []
    assert len(b.tensors) == 2


ON = {"llm.EnableCacheManager": "1"}

BAD_OPTIONS = [
    # step 3
    (None, AttributeError),
    ([], TypeError),
    ("x", TypeError),
    ({1: "x"}, TypeError),
    ({"llm.EnableCacheManager": 1}, TypeError),
    # step 4, before the mode
    ({"ge.flowGraphMemMaxSize": 5}, TypeError),
    ({"ge.flowGraphMemMaxSize": "1,2"}, PI),
    ({"ge.flowGraphMemMaxSize": "x"}, PI),
    ({"ge.flowGraphMemMaxSize": ""}, PI),
    # steps 6 and 7
    ({"llm.LocalCommRes": "", "llm.EnableCacheManager": "0"}, PI),
    # step 8
    ({"llm.TransferBackend": "hixl"}, (PI, "EnableCacheManager")),
    (
        ON | {"llm.TransferBackend": "hixl", "llm.EnableRemoteCacheAccessible": "0"},
        (PI, "EnableRemoteCacheAccessible"),
    ),
    (ON | {"llm.TransferBackend": "hixl"}, (PI, "listenIpInfo")),
    (ON | {"llm.TransferBackend": "", "llm.listenIpInfo": "127.0.0.1:0"}, PI),
    # step 9
    (ON | {"llm.listenIpInfo": "127.0.0.1"}, PI),
    (ON | {"llm.listenIpInfo": "a:b:1"}, PI),
    (ON | {"llm.listenIpInfo": "127.0.0.1:x"}, ValueError),
    (ON | {"llm.listenIpInfo": "127.0.0.1:65536"}, PI),
    (ON | {"llm.listenIpInfo": "{0}:x"}, ValueError),
    # step 10
    ({}, PI),
    ({"llm.EnableCacheManager": "0"}, PI),
    ({"llm.EnableCacheManager": "true"}, PI),
    # step 11
    (ON | {"llm.EnableRemoteCacheAccessible": "2"}, PI),
    (ON | {"ge.exec.deviceId": "0;1"}, PI),
    (ON | {"llm.SyncKvCacheWaitTime": "0"}, PI),
    (ON | {"llm.SyncKvCacheWaitTime": "-1"}, PI),
    (ON | {"llm.LinkTotalTime": str(2**31)}, PI),
    (ON | {"llm.MemPoolConfig": "not json"}, PI),
    (ON | {"llm.MemPoolConfig": "[]"}, PI),
    (ON | {"llm.MemPoolConfig": "{}"}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": "1"}'}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": true}'}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": 65535}'}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": 65536, "page_shift": 9}'}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": 65536, "page_shift": 31}'}, PI),
    (ON | {"llm.MemPoolConfig": '{"memory_size": 0}'}, OOM),
    (ON | {"llm.MemPoolConfig": json.dumps({"memory_size": 2**60, "page_shift": 30})}, OOM),
    (ON | {"llm.HostMemPoolConfig": "{}"}, PI),
]


@pytest.mark.parametrize(("options", "fault"), BAD_OPTIONS, ids=lambda v: str(v)[:60])
def test_init_refuses_and_may_be_retried(options, fault):
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    threads = threading.active_count()
    fault, text = fault if isinstance(fault, tuple) else (fault, None)
    if fault is ValueError:  # a port that is no number: ours is a parameter error as well
        with pytest.raises(ValueError, match=text):
            datadist.init(options)
    else:
        with raises(fault, text):
            datadist.init(options)
    assert threading.active_count() == threads
    assert LLMDataDist.llm_engine_instance is not datadist
    with pytest.raises(RuntimeError, match="not initialised"):
        _ = datadist.cache_manager
    datadist.init(make_options())
    datadist.finalize()


def test_hixl_backend_is_refused_with_a_word(monkeypatch):
    def missing() -> None:
        raise OSError("no libcann_hixl.so")

    monkeypatch.setattr(NativeLibrary, "load", missing)
    monkeypatch.setitem(sys.modules, "hixl", None)  # cannot be imported
    with raises(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, "not available"):
        LLMDataDist(LLMRole.PROMPT, 5).init(
            ON | {"llm.TransferBackend": "hixl", "llm.listenIpInfo": "127.0.0.1:0"}
        )


def test_local_comm_res_switches_both_flags_on():
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    datadist.init({"llm.LocalCommRes": ""})
    assert datadist._instance.config.remote_accessible
    datadist.finalize()


def test_init_leaves_the_options_alone():
    options = make_options()
    before = dict(options)
    with LLMDataDist(LLMRole.PROMPT, 5) as datadist:
        datadist.init(options)
    assert options == before


def test_unknown_options_are_ignored(instance_factory):
    assert instance_factory(**{"no.such.option": "1"}).cache_manager


def test_busy_port_fails_and_a_retry_works(instance_factory):
    owner = instance_factory()
    busy = "{}:{}".format(*owner.listen_address)
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    threads = threading.active_count()
    for _ in range(3):
        with raises(FAILED, "in use"):
            datadist.init(make_options(listen=busy, pool=65536))
    assert threading.active_count() == threads
    owner.finalize()
    datadist.init(make_options(listen=busy, pool=65536))
    assert datadist.listen_address == address_of(busy)
    datadist.finalize()


@pytest.mark.parametrize("text", ["999.1.1.1:0", "no host:0", "{0}:0"])
def test_bad_listen_text_is_param_invalid(text):
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    with raises(PI):
        datadist.init(make_options(listen=text))


def test_without_listen_ip_info_there_is_no_listener(instance_factory):
    assert instance_factory(listen=None).listen_address is None


# -- properties (6.3) -----------------------------------------------------------------------------

METHODS = {
    "cache_manager": lambda d: d.cache_manager,
    "kv_cache_manager": lambda d: d.kv_cache_manager,
    "check_link_status": lambda d: d.check_link_status(1),
    "link_clusters": lambda d: d.link_clusters([]),
    "unlink_clusters": lambda d: d.unlink_clusters([]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", ["before init", "after finalize"])
def test_methods_need_init(name, when, instance_factory):
    datadist = LLMDataDist(LLMRole.PROMPT, 5)
    if when == "after finalize":
        datadist = instance_factory()
        datadist.finalize()
    with pytest.raises(RuntimeError, match="init") as caught:
        METHODS[name](datadist)
    assert type(caught.value) is RuntimeError


def test_v1_members_are_refused(instance_factory):
    datadist = instance_factory()
    with raises(PI):
        _ = datadist.kv_cache_manager
    with raises(PI):
        datadist.check_link_status(1)


def test_cache_manager_is_one_object(instance_factory):
    datadist = instance_factory()
    assert isinstance(datadist.cache_manager, CacheManager)
    assert datadist.cache_manager is datadist.cache_manager


def test_engine_instance(instance_factory):
    assert LLMDataDist.llm_engine_instance is None
    one = instance_factory()
    assert LLMDataDist.llm_engine_instance is one
    other = instance_factory()
    assert LLMDataDist.llm_engine_instance is other
    LLMDataDist(LLMRole.PROMPT, 5)
    assert LLMDataDist.llm_engine_instance is other
    other.finalize()
    assert LLMDataDist.llm_engine_instance is one
    one.finalize()
    assert LLMDataDist.llm_engine_instance is None

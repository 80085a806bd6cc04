# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: the checks of init and their order, pools, listen addresses, unknown keys."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest

from llm_datadist_torch.values import config as config_module
from llm_datadist_torch.values.config import EngineConfig, LLMConfig, PoolConfig, role_to_str
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.status import (
    LLMException,
    LLMOutOfMemoryError,
    LLMParamError,
    LLMStatusCode,
)

PI = LLMParamError
ON = {"llm.EnableCacheManager": "1"}


def parse(options, role=LLMRole.PROMPT):
    return EngineConfig.from_options(role, options)


def test_engine_config_defaults():
    assert dataclasses.asdict(parse(ON)) == {
        "role": LLMRole.PROMPT,
        "device_id": 0,
        "device": "auto",
        "listen": None,
        "sync_timeout_ms": 1000,
        "device_pool": None,
        "host_pool": None,
        "remote_accessible": False,
        "local_comm_res": None,
        "transfer_backend": None,
        "transport": None,
        "global_resource_config": None,
        "rdma_traffic_class": None,
        "rdma_service_level": None,
        "link_total_time": 0,
        "link_retry_count": 1,
        "auto_relink": True,
        "allow_ptrace": False,
        "orphan_policy": "keep",
        "link_secret": None,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(ON).device_id = 1


def test_engine_config_of_everything():
    config = LLMConfig()
    config.device_id = 3
    config.sync_kv_timeout = "0250"
    config.listen_ip_info = "127.0.0.1:26000"
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.mem_pool_cfg = '{"memory_size": 1048576, "page_shift": 12}'
    config.host_mem_pool_cfg = '{"memory_size": 65536}'
    config.rdma_traffic_class = 132
    config.rdma_service_level = 4
    config.local_comm_res = ""
    config.transfer_backend = "hixl"
    config.global_resource_config = "{}"
    config.link_total_time = 7
    config.link_retry_count = 2
    config.auto_relink = False
    config.orphan_policy = "drop"
    config.device = "npu"
    options = config.generate_options()
    before = dict(options)
    assert EngineConfig.from_options(LLMRole.MIX, options) == EngineConfig(
        role=LLMRole.MIX,
        device_id=3,
        device="npu",
        listen=("127.0.0.1", 26000),
        sync_timeout_ms=250,
        device_pool=PoolConfig(1048576, 12),
        host_pool=PoolConfig(65536, 16),
        remote_accessible=True,
        local_comm_res="",
        transfer_backend="hixl",
        transport="hixl",
        global_resource_config="{}",
        rdma_traffic_class=132,
        rdma_service_level=4,
        link_total_time=7,
        link_retry_count=2,
        auto_relink=False,
        orphan_policy="drop",
    )
    assert options == before


LISTEN = {"llm.listenIpInfo": "127.0.0.1:1"}
HIXL = {"llm.TransferBackend": "hixl"}
OFF = {"llm.EnableCacheManager": "0"}
REMOTE = "llm.EnableRemoteCacheAccessible"


@pytest.mark.parametrize(
    ("options", "accessible"),
    [
        (ON, False),
        ({**ON, REMOTE: "0"}, False),
        ({**ON, REMOTE: "1"}, True),
        ({"llm.LocalCommRes": ""}, True),
        ({"llm.LocalCommRes": "", REMOTE: "0"}, False),
        ({**ON, **HIXL, **LISTEN}, True),
    ],
)
def test_what_follows_from_other_options(options, accessible):
    before = dict(options)
    assert parse(options).remote_accessible is accessible
    assert options == before


@pytest.mark.parametrize(
    ("options", "expected", "text"),
    [
        (None, AttributeError, "options"),
        ([], TypeError, "options"),
        ("{}", TypeError, "options"),
        ({1: "1"}, TypeError, "options"),
        ({**ON, "llm.LinkTotalTime": 1}, TypeError, "llm.LinkTotalTime"),
        ({**ON, "llm.LinkTotalTime": None}, TypeError, "llm.LinkTotalTime"),
        ({"ge.flowGraphMemMaxSize": 1}, TypeError, "flowGraphMemMaxSize"),
        ({**ON, "llm.Device": "cuda"}, PI, "llm.Device='cuda' must be one of auto, npu, cpu"),
        ({**ON, "llm.Device": ""}, PI, "llm.Device"),
        ({**ON, **HIXL, **LISTEN, "llm.Transport": "local"}, PI, "contradict each other"),
        ({**ON, "ge.flowGraphMemMaxSize": "1,2"}, PI, "flowGraphMemMaxSize"),
        ({**ON, "ge.flowGraphMemMaxSize": ""}, PI, "flowGraphMemMaxSize"),
        ({**ON, "ge.flowGraphMemMaxSize": "1k"}, PI, "flowGraphMemMaxSize"),
        ({**OFF, "llm.LocalCommRes": ""}, PI, "LocalCommRes.*enable_cache_manager = True"),
        ({"llm.LocalCommRes": "", **OFF, **HIXL}, PI, "LocalCommRes"),
        (HIXL, PI, "EnableCacheManager"),
        ({**HIXL, **OFF}, PI, "EnableCacheManager"),
        ({**HIXL, **ON, REMOTE: "0"}, PI, "EnableRemoteCacheAccessible"),
        ({**HIXL, **ON, REMOTE: "x"}, PI, "EnableRemoteCacheAccessible"),
        ({**HIXL, **ON}, PI, "listenIpInfo"),
        ({}, PI, "enable_cache_manager = True"),
        (OFF, PI, "enable_cache_manager = True"),
        ({"llm.EnableCacheManager": "true"}, PI, "enable_cache_manager = True"),
        ({"llm.EnableCacheManager": ""}, PI, "enable_cache_manager = True"),
        ({**OFF, "llm.listenIpInfo": "bad"}, PI, "enable_cache_manager = True"),
        ({**ON, REMOTE: "True"}, PI, REMOTE),
        ({**ON, REMOTE: ""}, PI, REMOTE),
        ({**ON, "ge.exec.deviceId": "0;1"}, PI, "ge.exec.deviceId"),
        ({**ON, "ge.exec.deviceId": "-1"}, PI, "ge.exec.deviceId"),
        ({**ON, "ge.exec.deviceId": ""}, PI, "ge.exec.deviceId"),
        ({**ON, "ge.exec.deviceId": "2147483648"}, PI, "ge.exec.deviceId"),
        ({**ON, "llm.SyncKvCacheWaitTime": "1.5"}, PI, "SyncKvCacheWaitTime"),
        ({**ON, "llm.SyncKvCacheWaitTime": "+5"}, PI, "SyncKvCacheWaitTime"),
        ({**ON, "llm.SyncKvCacheWaitTime": "²"}, PI, "SyncKvCacheWaitTime"),
        ({**ON, "llm.SyncKvCacheWaitTime": "0"}, PI, "SyncKvCacheWaitTime"),
        ({**ON, "llm.SyncKvCacheWaitTime": "9" * 50}, PI, "SyncKvCacheWaitTime"),
        ({**ON, "llm.LinkTotalTime": "2147483648"}, PI, "LinkTotalTime"),
        ({**ON, "llm.LinkRetryCount": "0"}, PI, "LinkRetryCount"),
        ({**ON, "llm.LinkRetryCount": "101"}, PI, "LinkRetryCount"),
        ({**ON, "llm.RdmaTrafficClass": "4294967296"}, PI, "RdmaTrafficClass"),
        ({**ON, "llm.RdmaServiceLevel": "x"}, PI, "RdmaServiceLevel"),
        ({**ON, **LISTEN, "llm.TransferBackend": "nixl"}, PI, "TransferBackend='nixl'"),
        ({**ON, **LISTEN, "llm.TransferBackend": ""}, PI, "TransferBackend=''"),
        ({**ON, **LISTEN, "llm.TransferBackend": "HIXL"}, PI, "TransferBackend"),
    ],
)
def test_bad_options(options, expected, text):
    with pytest.raises(expected, match=text) as caught:
        parse(options)
    assert isinstance(caught.value, LLMException) == (expected is PI)
    if expected is PI:
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_order_of_the_role():
    with pytest.raises(LLMParamError, match="flowGraphMemMaxSize"):
        parse({"ge.flowGraphMemMaxSize": "x"}, None)
    with pytest.raises(KeyError):
        parse({"llm.LocalCommRes": "", **OFF}, None)
    assert [role_to_str(role) for role in LLMRole] == ["Prompt", "Decoder", "Mix"]


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:26000", ("127.0.0.1", 26000)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("not judged here: 65535 ", ("not judged here", 65535)),
        ("[::1]:26000", ("::1", 26000)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        ("[1.2.3.4]:1", ("[1.2.3.4]", 1)),
        (":5", ("", 5)),
    ],
)
def test_listen_addresses(text, listen):
    assert parse({**ON, "llm.listenIpInfo": text}).listen == listen


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1", "1.2.3.4:5:6", "::1:26000", "[::1]", "1.2.3.4:x", "1.2.3.4:", "1.2.3.4:{",
     "{:1}", "1.2.3.4:-1", "1.2.3.4:65536", "1.2.3.4:1,5.6.7.8:1",
     pytest.param("1.2.3.4:" + "9" * 5000, id="long")],
)  # fmt: skip
def test_bad_listen_addresses(text):
    with pytest.raises(LLMParamError, match="listenIpInfo") as caught:
        parse({**ON, "llm.listenIpInfo": text})
    assert isinstance(caught.value, ValueError)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("key", ["llm.MemPoolConfig", "llm.HostMemPoolConfig"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"memory_size": 102428800, "page_shift": 16}', PoolConfig(102428800, 16)),
        ('{"memory_size": 65536}', PoolConfig(65536, 16)),
        ('{"memory_size": 1024, "page_shift": 10, "other": []}', PoolConfig(1024, 10)),
        ('{"memory_size": 1073741824, "page_shift": 30}', PoolConfig(2**30, 30)),
        (json.dumps({"memory_size": ((2**32 - 2) << 10) + 1, "page_shift": 10}),
         PoolConfig(((2**32 - 2) << 10) + 1, 10)),
        (json.dumps({"memory_size": (2**32 - 1) << 10, "page_shift": 10}), "too many pages"),
        ("", "not JSON"),
        ("{", "not JSON"),
        pytest.param("[" * 100000, "not JSON", id="deep"),
        pytest.param('{"memory_size": ' + "9" * 5000 + "}", "not JSON", id="long"),
        ("[]", "JSON object"),
        ('[{"memory_size": 65536}]', "JSON object"),
        ("1", "JSON object"),
        ("{}", "no memory_size"),
        ('{"page_shift": 16}', "no memory_size"),
        ('{"memory_size": "65536"}', "memory_size must be"),
        ('{"memory_size": 65536.0}', "memory_size must be"),
        ('{"memory_size": true}', "memory_size must be"),
        ('{"memory_size": null}', "memory_size must be"),
        ('{"memory_size": -1}', "memory_size must be"),
        ('{"memory_size": 65536, "page_shift": "16"}', "page_shift must be"),
        ('{"memory_size": 65536, "page_shift": null}', "page_shift must be"),
        ('{"memory_size": 65536, "page_shift": 9}', "page_shift=9"),
        ('{"memory_size": 65536, "page_shift": 31}', "page_shift=31"),
        ('{"memory_size": 0, "page_shift": 31}', "page_shift=31"),
        ('{"memory_size": 65535}', "less than one page"),
    ],
)  # fmt: skip
def test_pools(key, text, expected):
    if isinstance(expected, PoolConfig):
        made = parse({**ON, key: text})
        pools = {"llm.MemPoolConfig": made.device_pool, "llm.HostMemPoolConfig": made.host_pool}
        assert pools.pop(key) == expected
        assert set(pools.values()) == {None}
    else:
        with pytest.raises(LLMParamError, match=f"{key}: .*{expected}"):
            parse({**ON, key: text})


def test_pools_of_no_bytes():
    with pytest.raises(LLMOutOfMemoryError, match="memory_size=0"):
        parse({**ON, "llm.MemPoolConfig": '{"memory_size": 0}'})
    with pytest.raises(LLMParamError, match="less than one page"):
        parse({**ON, "llm.HostMemPoolConfig": '{"memory_size": 0}'})


def test_unknown_keys_are_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(config_module, "_warned_keys", set())
    caplog.set_level(logging.WARNING, logger="llm_datadist_torch")
    options = {**ON, "llm.ListenIpInfo": "1.2.3.4:1", "ge.unheard_of": "1", "a\n\ud800b": "1"}
    for _ in range(2):
        parse(options)
    messages = sorted(record.getMessage() for record in caplog.records)
    assert messages == [
        r"Option 'a\n\ud800b' is ignored.",
        "Option ge.unheard_of is ignored.",
        "Option llm.ListenIpInfo is ignored. Did you mean llm.listenIpInfo?",
    ]
    assert {record.name for record in caplog.records} == {"llm_datadist_torch"}


def test_known_but_ignored_keys_are_not_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(config_module, "_warned_keys", set())
    caplog.set_level(logging.WARNING, logger="llm_datadist_torch")
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_switch_role = True
    config.buf_pool_cfg = config.deploy_res_path = "x"
    config.output_max_size = 1
    config.cluster_info = "{}"
    options = {**config.generate_options(), "ge.flowGraphMemMaxSize": "1", "llm.Role": "Prompt"}
    parse(options)
    assert caplog.records == []


def test_of_the_environment_only_the_secrets_file_is_read():
    code = (
        "import os\n"
        "class Watched(dict):\n"
        "    def __getitem__(self, key): raise SystemExit(f'read {key}')\n"
        "    __contains__ = __getitem__\n"
        "    def get(self, key, default=None):\n"
        "        return default if key == 'LLM_DATADIST_LINK_SECRET_FILE' else self[key]\n"
        "import importlib, logging, threading\n"
        "from llm_datadist_torch.values import config as module\n"  # third parties may read theirs
        "os.environ = Watched()\n"
        "module = importlib.reload(module)\n"
        "EngineConfig, LLMConfig, LLMRole = module.EngineConfig, module.LLMConfig, module.LLMRole\n"
        "config = LLMConfig(); config.enable_cache_manager = True\n"
        "EngineConfig.from_options(LLMRole.MIX, config.generate_options())\n"
        "assert threading.active_count() == 1 and not logging.getLogger().handlers\n"
        "print('ok')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.stdout.strip() == "ok", done.stderr

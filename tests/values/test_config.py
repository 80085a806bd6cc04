# SPDX-License-Identifier: Apache-2.0
"""LLMConfig: its properties, their checks, and the options made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llm_datadist_torch.values.config import LLMConfig, LlmConfig
from llm_datadist_torch.values.status import (
    LLMException,
    LLMParamError,
    LLMStatusCode,
)

PI = LLMParamError
TEXT_IF_ANY = {
    "listen_ip_info": "llm.listenIpInfo",
    "mem_pool_cfg": "llm.MemPoolConfig",
    "host_mem_pool_cfg": "llm.HostMemPoolConfig",
    "buf_pool_cfg": "llm.BufPoolCfg",
    "deploy_res_path": "llm.deployResPath",
}
TEXT_EVEN_EMPTY = {
    "local_comm_res": "llm.LocalCommRes",
    "transfer_backend": "llm.TransferBackend",
    "global_resource_config": "llm.GlobalResourceConfig",
}
FLAGS = {
    "enable_cache_manager": "llm.EnableCacheManager",
    "enable_remote_cache_accessible": "llm.EnableRemoteCacheAccessible",
}
DEFAULTS = {
    "device_id": None,
    "device": "auto",
    "sync_kv_timeout": None,
    "rdma_traffic_class": None,
    "rdma_service_level": None,
    "link_total_time": 0,
    "link_retry_count": 1,
    "heartbeat_interval": 1000,
    "auto_relink": True,
    "allow_ptrace": False,
    "orphan_policy": "keep",
    "ge_options": {},
    "enable_switch_role": False,
    "mem_utilization": 0.95,
    "output_max_size": None,
    "cluster_info": "",
    "options": {},
    **dict.fromkeys(TEXT_IF_ANY, ""),
    **dict.fromkeys(TEXT_EVEN_EMPTY, ""),
    **dict.fromkeys(FLAGS, False),
}
FRESH = {"llm.MemoryUtilization": "0.95"}


def options_of(**properties):
    config = LLMConfig()
    for name, value in properties.items():
        setattr(config, name, value)
    options = config.generate_options()
    assert options.pop("llm.MemoryUtilization") == "0.95"
    return options


def test_a_fresh_config():
    assert LLMConfig is LlmConfig
    config = LLMConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.generate_options() == config.gen_options() == config.options == FRESH
    config.no_such_thing = 1
    assert config.generate_options() == FRESH


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"device_id": 0}, {"ge.exec.deviceId": "0", "ge.session_device_id": "0"}),
        ({"device_id": [3, 1]}, {"ge.exec.deviceId": "3;1", "ge.session_device_id": "3"}),
        ({"device_id": (2,)}, {"ge.exec.deviceId": "2", "ge.session_device_id": "2"}),
        ({"device_id": True}, {"ge.exec.deviceId": "1", "ge.session_device_id": "1"}),
        ({"device": "cpu"}, {"llm.Device": "cpu"}),
        ({"device": "auto"}, {"llm.Device": "auto"}),
        ({"device": None}, {}),
        ({"sync_kv_timeout": 5}, {"llm.SyncKvCacheWaitTime": "5"}),
        ({"sync_kv_timeout": "0500"}, {"llm.SyncKvCacheWaitTime": "0500"}),
        ({"sync_kv_timeout": True}, {"llm.SyncKvCacheWaitTime": "1"}),
        ({"sync_kv_timeout": 2**31 - 1}, {"llm.SyncKvCacheWaitTime": "2147483647"}),
        ({"rdma_traffic_class": 100}, {"llm.RdmaTrafficClass": "100"}),
        ({"rdma_service_level": 0}, {"llm.RdmaServiceLevel": "0"}),
        ({"link_total_time": 0}, {"llm.LinkTotalTime": "0"}),
        ({"link_total_time": 2**31 - 1}, {"llm.LinkTotalTime": "2147483647"}),
        ({"link_retry_count": 100}, {"llm.LinkRetryCount": "100"}),
        ({"heartbeat_interval": 0}, {"llm.HeartbeatInterval": "0"}),
        ({"heartbeat_interval": 20}, {"llm.HeartbeatInterval": "20"}),
        ({"auto_relink": False}, {"llm.AutoRelink": "0"}),
        ({"allow_ptrace": True}, {"llm.AllowPtrace": "1"}),
        ({"orphan_policy": "offer_again"}, {"llm.OrphanPolicy": "offer_again"}),
        ({"enable_switch_role": True}, {"llm.EnableSwitchRole": "1"}),
        ({"enable_switch_role": False}, {}),
        ({"enable_switch_role": None}, {}),
        ({"output_max_size": 7}, {"llm.OutputMaxSize": "7"}),
        ({"output_max_size": None}, {}),
        (
            {"ge_options": {"a": "b", "llm.LinkTotalTime": "9"}},
            {"a": "b", "llm.LinkTotalTime": "9"},
        ),
        (
            {"ge_options": {"llm.LinkTotalTime": "9"}, "link_total_time": 3},
            {"llm.LinkTotalTime": "3"},
        ),
        *(({name: "text"}, {key: "text"}) for name, key in TEXT_IF_ANY.items()),
        *(({name: ""}, {}) for name in TEXT_IF_ANY),
        *(({name: None}, {}) for name in TEXT_IF_ANY),
        *(({name: "text"}, {key: "text"}) for name, key in TEXT_EVEN_EMPTY.items()),
        *(({name: ""}, {key: ""}) for name, key in TEXT_EVEN_EMPTY.items()),
        *(({name: None}, {}) for name in TEXT_EVEN_EMPTY),
        *(({name: True}, {key: "1"}) for name, key in FLAGS.items()),
        *(({name: False}, {key: "0"}) for name, key in FLAGS.items()),
        *(({name: None}, {}) for name in FLAGS),
    ],
)
def test_options_of_a_property(properties, expected):
    assert options_of(**properties) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("device_id", None, TypeError),
        ("device_id", "0", TypeError),
        ("device_id", [0, "1"], TypeError),
        ("device_id", [None], TypeError),
        ("device_id", {0}, TypeError),
        ("device_id", np.bool_(False), TypeError),
        ("device_id", -1, PI),
        ("device_id", [0, -1], PI),
        ("device_id", 2**31, ValueError),
        ("device_id", [2**31], ValueError),
        ("device", 0, TypeError),
        ("device", "cuda", PI),
        ("device", "npu:0", PI),
        ("sync_kv_timeout", None, TypeError),
        ("sync_kv_timeout", 1.5, TypeError),
        ("sync_kv_timeout", "1s", PI),
        ("sync_kv_timeout", "", PI),
        ("sync_kv_timeout", "-1", PI),
        ("sync_kv_timeout", "²", PI),
        ("sync_kv_timeout", "{}", PI),
        ("sync_kv_timeout", 0, PI),
        ("sync_kv_timeout", "0", PI),
        ("sync_kv_timeout", -5, PI),
        ("sync_kv_timeout", 2**31, ValueError),
        ("sync_kv_timeout", "2147483648", ValueError),
        pytest.param("sync_kv_timeout", "9" * 5000, ValueError, id="long"),
        *((name, 1, TypeError) for name in (*TEXT_IF_ANY, *TEXT_EVEN_EMPTY)),
        *((name, 1, TypeError) for name in (*FLAGS, "enable_switch_role")),
        *((name, "1", TypeError) for name in (*FLAGS, "enable_switch_role")),
        ("rdma_traffic_class", None, TypeError),
        ("rdma_traffic_class", "1", TypeError),
        ("rdma_traffic_class", -1, ValueError),
        ("rdma_traffic_class", 2**32, ValueError),
        ("rdma_service_level", None, TypeError),
        ("rdma_service_level", 2**32, ValueError),
        ("link_total_time", None, TypeError),
        ("link_total_time", "1", TypeError),
        ("link_total_time", -1, PI),
        ("link_total_time", 2**31, PI),
        ("link_total_time", 2**32 - 1, PI),
        ("link_retry_count", None, TypeError),
        ("link_retry_count", 0, PI),
        ("link_retry_count", 101, PI),
        ("heartbeat_interval", "1", TypeError),
        ("heartbeat_interval", 19, PI),
        ("heartbeat_interval", 3_600_001, PI),
        ("auto_relink", 1, TypeError),
        ("orphan_policy", "leave", PI),
        ("ge_options", None, AttributeError),
        ("ge_options", [], TypeError),
        ("ge_options", {"a": 1}, TypeError),
        ("ge_options", {1: "a"}, TypeError),
        ("mem_utilization", None, TypeError),
        ("mem_utilization", 1, TypeError),
        ("mem_utilization", 1.01, PI),
        ("mem_utilization", -0.1, PI),
        ("mem_utilization", float("nan"), PI),
        ("output_max_size", "1", TypeError),
        ("cluster_info", None, TypeError),
        ("cluster_info", 1, TypeError),
        ("cluster_info", "{", json.JSONDecodeError),
        ("cluster_info", "[]", PI),
        ("cluster_info", '{"listen_ip_info": [1]}', PI),
        ("cluster_info", '{"listen_ip_info": [{"ip": "host"}]}', RuntimeError),
        ("options", {}, AttributeError),
    ],
)
def test_bad_assignments(name, value, expected):
    config = LLMConfig()
    before = getattr(config, name)
    with pytest.raises(expected) as caught:
        setattr(config, name, value)
    assert isinstance(caught.value, LLMException) == (expected in (PI, RuntimeError))
    if expected is PI:
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        assert name in str(caught.value)
    assert getattr(config, name) == before
    assert config.generate_options() == FRESH


def test_none_is_kept_or_unsets():
    config = LLMConfig()
    for name in TEXT_IF_ANY:
        setattr(config, name, None)
        assert getattr(config, name) is None
    for name in TEXT_EVEN_EMPTY:
        setattr(config, name, "x")
        setattr(config, name, None)
        assert getattr(config, name) == ""
    for name in FLAGS:
        setattr(config, name, True)
        setattr(config, name, None)
        assert getattr(config, name) is False


def test_mem_utilization_is_always_given():
    config = LLMConfig()
    config.mem_utilization = 0.5
    assert config.generate_options() == {"llm.MemoryUtilization": "0.5"}


def test_an_empty_list_of_devices():
    config = LLMConfig()
    config.device_id = []
    with pytest.raises(IndexError):
        config.generate_options()


def test_cluster_info_text_becomes_a_number():
    config = LLMConfig()
    info = {"cluster_id": 0, "listen_ip_info": [{"ip": "1.2.3.4", "port": 1}, {"ip": 5}]}
    config.cluster_info = json.dumps(info)
    made = json.loads(config.generate_options()["llm.ClusterInfo"])
    info["listen_ip_info"][0]["ip"] = 67305985
    assert made == info


def test_every_dict_is_a_fresh_one():
    config = LLMConfig()
    assert config.options == {}
    config.listen_ip_info = "127.0.0.1:1"
    first = config.generate_options()
    first["mine"] = "x"
    config.listen_ip_info = ""
    assert "mine" not in config.options
    assert "llm.listenIpInfo" in config.options
    assert config.generate_options() == FRESH
    config.options["mine"] = "x"
    assert config.options == FRESH
    assert "llm.listenIpInfo" in first
    assert LLMConfig().ge_options is not config.ge_options


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sync_kv_timout", "did you mean sync_kv_timeout?"), ("zzzz_9", "it does nothing")],
)
def test_a_name_that_is_no_option_is_warned_of(caplog, name, hint):
    for _ in range(2):
        setattr(LLMConfig(), name, 5)
    (record,) = (record for record in caplog.records if name in record.message)
    assert record.levelname == "WARNING"
    assert hint in record.message
    assert options_of(**{name: 5}) == {}

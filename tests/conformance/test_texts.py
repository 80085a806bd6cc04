# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a text, the right error comes out of it, and can be shown and logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMParamError,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    TransferConfig,
)
from llm_datadist_torch.values.status import handle_llm_status, raise_if_false, raise_if_true
from tests.conftest import make_options

pytestmark = pytest.mark.same_on_every_device

TEXTS = ["{", "}", "{}", "{0}", "{name!r:>{width}}", "%s %d %", "a\nb\r\t", "名前 ü 🚀"]
TEXTS += ["\x00", "\udcff", ""]

ON = {"llm.EnableCacheManager": "1"}


def init(**options: str) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    try:
        datadist.init(ON | options)
    finally:
        datadist.finalize()


def option(key: str) -> Callable[[str], Any]:
    return lambda text: init(**{key: text})


def switch(text: str) -> None:
    with LLMDataDist(LLMRole.MIX, 1) as datadist:
        datadist.init(make_options())
        datadist.switch_role(LLMRole.MIX, {"llm.listenIpInfo": text})


def rank_table(text: str) -> None:
    with LLMDataDist(LLMRole.MIX, 1) as datadist:
        datadist.init(make_options())
        datadist.link(text or "name", {1: 0, 2: 1}, text)


def assign(name: str) -> Callable[[str], Any]:
    return lambda text: setattr(LLMConfig(), name, text)


# Entry points that must refuse every one of these texts, and with what.
Expected = type[Exception] | tuple[type[Exception], ...]
REFUSE: dict[str, tuple[Callable[[str], Any], Expected]] = {
    "local ip": (lambda t: LLMClusterInfo().append_local_ip_info(t, 1), LLMParamError),
    "remote ip": (lambda t: LLMClusterInfo().append_remote_ip_info(t, 1), LLMParamError),
    "ip info port": (lambda t: LLMClusterInfo().append_local_ip_info("127.0.0.1", t), TypeError),
    "remote_cluster_id": (lambda t: setattr(LLMClusterInfo(), "remote_cluster_id", t), TypeError),
    "device_id": (assign("device_id"), TypeError),
    "sync_kv_timeout": (assign("sync_kv_timeout"), LLMParamError),
    "link_retry_count": (assign("link_retry_count"), TypeError),
    "enable_cache_manager": (assign("enable_cache_manager"), TypeError),
    "cluster_info": (lambda t: assign("cluster_info")("[" + t), json.JSONDecodeError),
    "cluster_info ip": (
        lambda t: assign("cluster_info")(json.dumps({"listen_ip_info": [{"ip": t}]})),
        LLMParamError,
    ),
    "listen host": (lambda t: init(**{"llm.listenIpInfo": f"{t}:0"}), LLMParamError),
    "listen port": (lambda t: init(**{"llm.listenIpInfo": f"127.0.0.1:{t}"}), ValueError),
    "listen": (option("llm.listenIpInfo"), ValueError),
    "manager flag": (option("llm.EnableCacheManager"), LLMParamError),
    "remote flag": (option("llm.EnableRemoteCacheAccessible"), LLMParamError),
    "backend": (option("llm.TransferBackend"), LLMException),
    "timeout": (option("llm.SyncKvCacheWaitTime"), LLMParamError),
    "device": (option("ge.exec.deviceId"), LLMParamError),
    "pool": (option("llm.MemPoolConfig"), LLMParamError),
    "pool size": (
        lambda t: option("llm.MemPoolConfig")(json.dumps({"memory_size": t})),
        LLMParamError,
    ),
    "host pool": (option("llm.HostMemPoolConfig"), LLMParamError),
    "graph memory": (option("ge.flowGraphMemMaxSize"), LLMParamError),
    "rank_table": (rank_table, LLMParamError),
    "switch_role": (switch, (LLMParamError, ValueError)),
    "role": (lambda t: LLMDataDist(t, 1), TypeError),
    "cluster id": (lambda t: LLMDataDist(LLMRole.MIX, t), TypeError),
    "desc shape": (lambda t: CacheDesc(1, t, DataType.DT_INT8), TypeError),
    "desc dims": (lambda t: CacheDesc(1, [t], DataType.DT_INT8), TypeError),
    "desc type": (lambda t: CacheDesc(1, [1], t), TypeError),
    "key": (lambda t: CacheKey(1, t), TypeError),
    "key keyword": (lambda t: CacheKey(1, 2, **{t: 3}), LLMParamError),
    "blocks key keyword": (lambda t: BlocksCacheKey(1, **{t: 3}), LLMParamError),
    "address": (lambda t: TransferConfig(1, [t]), TypeError),
    "memory info": (lambda t: MemInfo(Memtype.MEM_TYPE_DEVICE, t, 1), TypeError),
    "cpu cache": (lambda t: Cache.create_cpu_cache(DESC, [t]), TypeError),
    "raise_if_false": (lambda t: raise_if_false(False, t), LLMParamError),
    "raise_if_true": (lambda t: raise_if_true(True, t), LLMParamError),
    "handle_llm_status": (
        lambda t: handle_llm_status(int(LLMStatusCode.LLM_TIMEOUT), t, t),
        LLMException,
    ),
}  # fmt: skip
DESC = CacheDesc(1, [1], DataType.DT_INT8)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("name", REFUSE)
def test_the_error_is_the_one_that_is_meant(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    call, expected = REFUSE[name]
    with pytest.raises(expected) as caught:
        call(text)
    shown = str(caught.value)
    assert repr(caught.value)
    logging.getLogger("llm_datadist_torch").error("%s", shown)
    assert caplog.messages[-1] == shown


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_that_are_kept_are_kept_as_they_are(text: str) -> None:
    desc = CacheDesc(1, [2, 4], DataType.DT_INT8, kv_tensor_format=text)
    assert desc.kv_tensor_format == text
    assert repr(desc).endswith(f",kv_tensor_format={text})")
    config = LLMConfig()
    for name in ("listen_ip_info", "local_comm_res", "deploy_res_path", "mem_pool_cfg"):
        setattr(config, name, text)
        assert getattr(config, name) == text
    config.ge_options = {text: text}
    assert config.generate_options()[text] == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text], ids=ascii)
def test_unknown_options_are_only_warned_of(text: str) -> None:
    init(**{text: text})

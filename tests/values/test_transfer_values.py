# SPDX-License-Identifier: Apache-2.0
"""TransferConfig, TransferWithCacheKeyConfig, LayerSynchronizer, MemInfo."""

from __future__ import annotations

import pytest

from llm_datadist_torch.values.enums import Memtype
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import LLMException, LLMParamError
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

PI = LLMParamError
BAD_RANGES = [
    ([0, 1], TypeError, "only support range"),
    (range(0, 4, 2), PI, "step"),
    (range(-1, 1), PI, "below 0"),
    (range(0), PI, "no layer"),
    (range(2, 1), PI, "no layer"),
]


def test_transfer_config():
    addrs = [1, 2]
    config = TransferConfig(1, addrs)
    assert (
        repr(config)
        == str(config)
        == (
            "TransferConfig(dst_cluster_id=1, dst_addrs=[1, 2], src_layer_range=None, "
            "src_batch_index=0)"
        )
    )
    assert config.dst_addrs is addrs
    assert config.dst_layer_range is None
    config.dst_cluster_id, config.dst_addrs = 2, (3,)
    config.src_layer_range, config.src_batch_index = range(1, 2), 4
    config.dst_layer_range = range(1)
    assert "dst_cluster_id=2, dst_addrs=(3,), src_layer_range=range(1, 2)" in repr(config)
    assert config.src_batch_index == 4


@pytest.mark.parametrize(
    ("name", "value", "expected", "text"),
    [
        ("dst_cluster_id", None, TypeError, "dst_cluster_id"),
        ("dst_cluster_id", "1", TypeError, "dst_cluster_id"),
        ("dst_cluster_id", -1, ValueError, "dst_cluster_id"),
        ("dst_cluster_id", 2**64, ValueError, "dst_cluster_id"),
        ("dst_addrs", None, TypeError, "dst_addrs"),
        ("dst_addrs", {1}, TypeError, "dst_addrs"),
        ("dst_addrs", [1, "2"], TypeError, r"dst_addrs\[1\]"),
        ("dst_addrs", [1, True], TypeError, r"dst_addrs\[1\]"),
        ("dst_addrs", [-1], ValueError, r"dst_addrs\[0\]"),
        ("dst_addrs", [2**64], ValueError, r"dst_addrs\[0\]"),
        *(("src_layer_range", *bad) for bad in BAD_RANGES),
        ("src_batch_index", None, TypeError, "src_batch_index"),
        ("src_batch_index", -1, ValueError, "src_batch_index"),
        ("src_batch_index", 2**32, ValueError, "src_batch_index"),
    ],
)
def test_bad_transfer_configs(name, value, expected, text):
    arguments = {"dst_cluster_id": 1, "dst_addrs": [1]}
    with pytest.raises(expected, match=text) as caught:
        TransferConfig(**{**arguments, name: value})
    assert isinstance(caught.value, LLMException) == (expected is PI)
    config = TransferConfig(**arguments)
    before = repr(config)
    with pytest.raises(expected, match=text):
        setattr(config, name, value)
    assert repr(config) == before


def test_order_of_transfer_config_checks():
    with pytest.raises(TypeError, match="dst_cluster_id"):
        TransferConfig(None, None, 1, None)
    with pytest.raises(TypeError, match="dst_addrs"):
        TransferConfig(1, None, 1, None)
    with pytest.raises(TypeError, match="src_layer_range"):
        TransferConfig(1, [], 1, None)


def test_transfer_with_cache_key_config():
    key = CacheKeyByIdAndIndex(3, 4)
    config = TransferWithCacheKeyConfig(key, range(1), range(1))
    assert (
        repr(config)
        == str(config)
        == (
            f"TransferWithCacheKeyConfig(cache_key={key}, src_layer_range=range(0, 1), "
            "dst_layer_range=range(0, 1), src_batch_index=0)"
        )
    )
    assert config.dst_cluster_id == 3
    assert config.cache_key is key
    # The setters look at one value at a time.
    config.cache_key = BlocksCacheKey(9)
    assert config.dst_cluster_id == 3
    config.src_layer_range = range(1, 4)
    config.dst_layer_range = None
    config.src_layer_range = None
    config.cache_key = None
    config.src_batch_index = 2
    assert (config.cache_key, config.src_layer_range, config.dst_layer_range) == (None,) * 3
    assert config.src_batch_index == 2


@pytest.mark.parametrize(
    ("args", "expected", "text"),
    [
        ((None, range(1), range(1)), TypeError, "cache_key"),
        ((CacheKey(1, 2), range(1), range(1)), TypeError, "cache_key"),
        ((BlocksCacheKey(1),), TypeError, "src_layer_range"),
        ((BlocksCacheKey(1), range(1)), TypeError, "dst_layer_range"),
        *(((BlocksCacheKey(1), bad[0], range(1)), *bad[1:]) for bad in BAD_RANGES),
        *(((BlocksCacheKey(1), range(1), bad[0]), *bad[1:]) for bad in BAD_RANGES),
        ((BlocksCacheKey(1), range(1), range(2)), PI, "differ in length"),
        ((BlocksCacheKey(1), range(2**80), range(2**81)), PI, "differ in length"),
        ((BlocksCacheKey(1), range(1), range(1), None), TypeError, "src_batch_index"),
        ((BlocksCacheKey(1), range(1), range(1), 2**32), ValueError, "src_batch_index"),
        ((BlocksCacheKey(1), range(1), range(1), 1), PI, "src_batch_index=1 must be 0"),
    ],
)
def test_bad_transfer_with_cache_key_configs(args, expected, text):
    with pytest.raises(expected, match=text) as caught:
        TransferWithCacheKeyConfig(*args)
    assert isinstance(caught.value, LLMException) == (expected is PI)


def test_bad_assignments_to_a_key_config():
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 2), range(1), range(1), 3)
    before = repr(config)
    for name in ("src_layer_range", "dst_layer_range"):
        for value, expected, text in BAD_RANGES:
            with pytest.raises(expected, match=text):
                setattr(config, name, value)
    with pytest.raises(TypeError, match="cache_key"):
        config.cache_key = CacheKey(1, 2)
    with pytest.raises(ValueError, match="src_batch_index"):
        config.src_batch_index = -1
    assert repr(config) == before


def test_layer_synchronizer_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LayerSynchronizer()

    class Ready(LayerSynchronizer):
        def synchronize_layer(self, layer_index, timeout_in_millis):
            return True

    assert Ready().synchronize_layer(0, None)


def test_mem_info():
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 2)
    assert repr(info) == str(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=1, size=2)"
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_DEVICE, 1, 2)
    for name in ("mem_type", "addr", "size"):
        with pytest.raises(AttributeError):
            setattr(info, name, 1)
    assert repr(MemInfo(None, None, None)) == "MemInfo(mem_type=None, addr=None, size=None)"
    assert MemInfo(Memtype.MEM_TYPE_HOST, 0, -1).size == -1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((1, 1, 1), "mem_type"),
        ((Memtype.MEM_TYPE_HOST, "1", 1), "addr"),
        ((Memtype.MEM_TYPE_HOST, True, 1), "addr"),
        ((Memtype.MEM_TYPE_HOST, 1, 1.0), "size"),
    ],
)
def test_bad_mem_infos(args, text):
    with pytest.raises(TypeError, match=f"{text} only support"):
        MemInfo(*args)

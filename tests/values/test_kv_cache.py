# SPDX-License-Identifier: Apache-2.0
"""KvCache, the v1 value (reference API, 7.3)."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist_torch import CacheDesc, DataType, KvCache, LLMParamError, Placement

HOST = CacheDesc(2, [4, 8], DataType.DT_INT8, Placement.HOST)
DEVICE = CacheDesc(2, [4, 8], DataType.DT_INT8)


def test_properties_and_text():
    addrs = [[1, 2], [3, 4], [5, 6]]
    cache = KvCache(7, DEVICE, addrs, None)
    assert (cache.cache_id, cache.cache_desc) == (7, DEVICE)
    assert cache.per_device_tensor_addrs == addrs
    assert str(cache) == repr(cache) == "KvCache(cache_id = 7, num_devices = 3)"


@pytest.mark.parametrize(
    ("addrs", "per_device"), [([1, 2], [[1, 2]]), ([[1, 2]], [[1, 2]]), ([[1, 2], [3, 4]],) * 2]
)
def test_create_cpu_cache(addrs: list[Any], per_device: list[list[int]]):
    cache = KvCache.create_cpu_cache(HOST, addrs)
    assert (cache.cache_id, cache.cache_desc) == (-1, HOST)
    assert cache.per_device_tensor_addrs == per_device
    assert repr(cache) == f"KvCache(cache_id = -1, num_devices = {len(per_device)})"


@pytest.mark.parametrize(
    ("desc", "addrs", "error"),
    [
        (1, [1, 2], TypeError),
        (None, [1, 2], AttributeError),
        (HOST, None, TypeError),
        (HOST, (1, 2), TypeError),
        (HOST, [1, "2"], TypeError),
        (HOST, [1, None], TypeError),
        (HOST, [True, 2], TypeError),
        (HOST, [[1, 2], 3], TypeError),
        (HOST, [[1, 2], [3, 2.5]], TypeError),
        (HOST, [1, -1], ValueError),
        (HOST, [[1, 2**64]], ValueError),
        (DEVICE, [1, 2], LLMParamError),
        (HOST, [], LLMParamError),
        (HOST, [1], LLMParamError),
        (HOST, [[1, 2], [3]], LLMParamError),
    ],
)
def test_create_cpu_cache_refuses(desc: Any, addrs: Any, error: type[Exception]):
    with pytest.raises(error) as caught:
        KvCache.create_cpu_cache(desc, addrs)
    assert isinstance(caught.value, LLMParamError) == (error is LLMParamError)


@pytest.mark.parametrize("method", ["deallocate_cache", "deallocate_blocks_cache"])
def test_the_cache_manager_takes_none(instance_factory: Any, method: str):
    with pytest.raises(TypeError):
        getattr(instance_factory().cache_manager, method)(KvCache.create_cpu_cache(HOST, [1, 2]))

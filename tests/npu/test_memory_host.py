# SPDX-License-Identifier: Apache-2.0
"""Host memory for an NPU: pinned where we make it, and a word where the user's is not."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMOutOfMemoryError,
    Placement,
)
from llm_datadist_torch.memory import pinned
from llm_datadist_torch.memory.device import NpuDevice
from llm_datadist_torch.memory.pinned import PinnedMemory
from llm_datadist_torch.values.config import PoolConfig
from tests.peers import Service, spawn

DESC = CacheDesc(2, [4, 64], DataType.DT_FLOAT16, Placement.HOST)


def on_the_npu_and_back(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies asynchronously, which needs pinned memory."""
    there = tensor.to(device, non_blocking=True)
    back = torch.empty_like(tensor, pin_memory=True)
    back.copy_(there, non_blocking=True)
    torch.npu.synchronize()  # type: ignore[attr-defined]
    return back


@pytest.mark.parametrize("pooled", [False, True])
def test_host_caches_are_pinned(instance_factory, device: torch.device, pooled: bool) -> None:
    datadist = instance_factory(host_pool=4 << 20 if pooled else None)
    cache = datadist.cache_manager.allocate_blocks_cache(DESC)
    assert cache.device == torch.device("cpu")
    for number, tensor in enumerate(cache.tensors):
        assert tensor.is_pinned()
        tensor.copy_(torch.arange(256.0).view(4, 64) + number)
        assert torch.equal(on_the_npu_and_back(tensor, device), tensor)
    assert torch.equal(cache.tensors[0], torch.arange(256.0).view(4, 64).half())


@pytest.mark.parametrize("pooled", [False, True])
def test_pinned_memory_is_freed_with_its_last_tensor(
    device: torch.device, npu: Any, pooled: bool
) -> None:
    def in_use() -> int:
        return int(npu.host_memory_stats()["active_bytes.current"])

    before = in_use()
    memory = NpuDevice(device, "").host_memory(PoolConfig(1 << 20) if pooled else None)
    one, other = memory.allocate(2, (1000,), torch.float32).tensors
    del memory
    held = in_use()
    assert held > before
    del one
    other.fill_(1)
    assert in_use() == held
    del other
    # What earlier tests left to copies under way may be gone by now, too.
    assert in_use() <= before


def test_pinned_in_inference_mode() -> None:
    with torch.inference_mode():
        one, other = PinnedMemory().allocate(2, (8,), torch.float32).tensors
    version = other._version
    one.fill_(1)
    assert other._version == version
    assert not one.is_inference()


def test_pinned_with_another_default_device() -> None:
    with torch.device("meta"):
        (tensor,) = PinnedMemory().allocate(1, (8,), torch.float32).tensors
    assert tensor.device == torch.device("cpu")
    assert tensor.is_pinned()


def test_more_than_the_host_has() -> None:
    with pytest.raises(LLMOutOfMemoryError):
        PinnedMemory().allocate(1, (1 << 50,), torch.uint8)


def test_peers_read_and_write_pinned_host_caches() -> None:
    """They can't map them, but the kernel copies between the two processes."""
    here, there, key = Service(), spawn(), BlocksCacheKey(2, 0)
    try:
        port = there.call("start", 2)
        here.start(1)
        for each in (here.allocate, partial(there.call, "allocate")):
            each("cache", 2, 4, 5000, paged=True, keys=key, placement=Placement.HOST)
        sent = there.call("fill", "cache", 7)
        cache = here.held["cache"].cache
        assert cache.tensors[0].is_pinned()
        assert here.link(2, port)[0] == "LLM_SUCCESS"
        here.manager.pull_blocks(key, cache, [0, 1, 2, 3], [3, 2, 1, 0])
        for number, start in enumerate(here.span("cache").starts):
            rows = torch.frombuffer(bytearray(sent[start : start + 20000]), dtype=torch.uint8)
            assert torch.equal(cache.tensors[number], rows.view(4, 5000).flip(0))
        cache.tensors[1].fill_(9)
        here.manager.push_blocks(key, cache, [0], [2])
        received = there.call("dump", "cache")
        start = here.span("cache").starts[1] + 2 * 5000
        assert received[start : start + 5000] == bytes([9]) * 5000
    finally:
        here.finish()
        there.close()


# -- the caller's memory --------------------------------------------------------------------------


@pytest.fixture
def warnings_of_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, npu: Any
) -> pytest.LogCaptureFixture:
    npu.synchronize()  # so that an NPU is in use
    monkeypatch.setattr(pinned, "_warned", False)
    caplog.set_level(logging.WARNING, "llm_datadist_torch")
    return caplog


@pytest.mark.parametrize("as_ints", [False, True])
def test_pinned_memory_of_the_caller(
    warnings_of_pageable: pytest.LogCaptureFixture, as_ints: bool
) -> None:
    owners = [torch.full((4, 64), at, dtype=torch.float16, pin_memory=True) for at in (1, 2)]
    cache = Cache.create_cpu_cache(DESC, [t.data_ptr() for t in owners] if as_ints else owners)
    assert cache.tensors[1].unique().tolist() == [2]
    cache.tensors[0][2] = 9
    assert owners[0][2].unique().tolist() == [9]
    assert warnings_of_pageable.messages == []


@pytest.mark.parametrize("as_ints", [False, True])
def test_pageable_memory_works_with_one_warning(
    warnings_of_pageable: pytest.LogCaptureFixture, instance_factory, as_ints: bool
) -> None:
    owners = [torch.full((4, 64), at, dtype=torch.float16) for at in (1, 2)]
    given = [t.data_ptr() for t in owners] if as_ints else owners
    for _ in range(2):
        assert Cache.create_cpu_cache(DESC, given).tensors[1].unique().tolist() == [2]
    cache = instance_factory().cache_manager.register_blocks_cache(DESC, given)
    assert cache.tensors[0].unique().tolist() == [1]
    (message,) = warnings_of_pageable.messages
    assert "not pinned" in message
    assert "pin_memory=True" in message


def test_nothing_is_said_where_no_npu_is_in_use(
    warnings_of_pageable: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, npu: Any
) -> None:
    monkeypatch.setattr(npu, "is_initialized", lambda: False)
    Cache.create_cpu_cache(DESC, [torch.zeros(4, 64, dtype=torch.float16) for _ in range(2)])
    assert warnings_of_pageable.messages == []

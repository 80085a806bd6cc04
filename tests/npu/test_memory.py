# SPDX-License-Identifier: Apache-2.0
"""Memory of allocated caches on an NPU: where it is, who counts it, when it is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_datadist_torch import CacheDesc, CacheKey, DataType, LLMOutOfMemoryError, LLMParamError
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.memory.device import NpuDevice
from llm_datadist_torch.memory.npu import NpuMemory
from llm_datadist_torch.memory.npu_address import segment_at, segments_of
from llm_datadist_torch.values.config import PoolConfig

TWO_MIB = 2 << 20


@pytest.fixture
def memory(device: torch.device) -> NpuMemory:
    return NpuMemory(device)


def pool(device: torch.device, size: int, shift: int = 16) -> ArenaMemory:
    made = NpuDevice(device, "").memory(PoolConfig(size, shift))
    assert isinstance(made, ArenaMemory)
    return made


def allocated(npu: Any) -> int:
    return int(npu.memory_stats(0)["allocated_bytes.all.current"])


def fill_all(tensors: tuple[torch.Tensor, ...]) -> None:
    for number, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 100 + number)


def check_all(tensors: tuple[torch.Tensor, ...]) -> None:
    for number, tensor in enumerate(tensors):
        expected = torch.arange(tensor.numel()).view(tensor.shape) % 100 + number
        assert torch.equal(tensor.cpu(), expected.to(tensor.dtype)), number


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 32768), (1 << 20,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float32])
def test_a_region(
    memory: NpuMemory, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # So that the allocator's next block doesn't start where a segment does.
    before = torch.empty(3 << 19, dtype=torch.uint8, device=device)
    allocation = memory.allocate(3, shape, dtype)
    del before
    region = allocation.region
    assert region.address % TWO_MIB == 0
    assert not region.shareable
    assert "NPU" in region.reason
    offsets = [tensor.data_ptr() - region.address for tensor in allocation.tensors]
    step = -(-allocation.tensors[0].nbytes // 65536) * 65536
    assert offsets == [0, step, 2 * step]
    assert region.nbytes == 2 * step + allocation.tensors[0].nbytes
    for tensor in allocation.tensors:
        assert (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, device)
        assert tensor.is_contiguous()
    fill_all(allocation.tensors)
    check_all(allocation.tensors)


def test_what_torch_counts_and_when_it_is_free(memory: NpuMemory, npu: Any) -> None:
    before = allocated(npu)
    allocation = memory.allocate(2, (1 << 20,), torch.float32)
    held = allocated(npu) - before
    assert 8 << 20 <= held <= (8 << 20) + 2 * TWO_MIB
    one, region = allocation.tensors[1], allocation.region
    del allocation
    assert allocated(npu) - before == held
    del region
    assert allocated(npu) - before == held
    one.fill_(3)
    assert one.sum().item() == 3 << 20
    del one
    assert allocated(npu) == before


def test_a_write_to_one_tensor_is_none_to_its_neighbours(memory: NpuMemory) -> None:
    one, other = memory.allocate(2, (4,), torch.float32).tensors
    version = other._version
    one.fill_(1)
    assert other._version == version
    assert not one._is_view()


def test_allocated_in_inference_mode(memory: NpuMemory, device: torch.device) -> None:
    with torch.inference_mode():
        (tensor,) = memory.allocate(1, (8,), torch.float32).tensors
        (pooled,) = pool(device, 1 << 20).allocate(1, (8,), torch.float32).tensors
    for each in (tensor, pooled):
        assert not each.is_inference()
        each.copy_(torch.arange(8.0))
        assert each.cpu().tolist() == list(range(8))


@pytest.mark.parametrize("pooled", [False, True])
def test_every_kind_of_operator(memory: NpuMemory, device: torch.device, pooled: bool) -> None:
    source = pool(device, 1 << 20) if pooled else memory
    one, other = source.allocate(2, (6, 4), torch.float32).tensors
    data = torch.arange(24.0).view(6, 4)
    one.copy_(data)
    other.zero_()
    ids = torch.tensor([4, 1], device=device)
    other.index_copy_(0, ids, one[:2])
    expected = torch.zeros(6, 4)
    expected[[4, 1]] = data[:2]
    assert torch.equal(other.cpu(), expected)
    assert torch.equal(one.index_select(0, ids).cpu(), data[[4, 1]])
    assert torch.equal(torch.cat([one, other]).cpu(), torch.cat([data, expected]))
    assert torch.equal(one.t().contiguous().cpu(), data.t())
    assert torch.equal((one + 1).view(4, 6).cpu(), (data + 1).view(4, 6))
    one[1:3] = other[1:3]
    data[1:3] = expected[1:3]
    assert torch.equal(one.cpu(), data)
    assert torch.equal(one.to(torch.float16).cpu(), data.half())


def test_more_than_the_device_has(memory: NpuMemory, npu: Any) -> None:
    before = allocated(npu)
    for count, asked in ((1, 1 << 45), (2**50, 4)):
        with pytest.raises(LLMOutOfMemoryError, match=r"bytes of npu:0, which has \d+") as caught:
            memory.allocate(count, (asked,), torch.uint8)
        assert (caught.value.requested_bytes or 0) >= asked
        assert caught.value.free_bytes
    assert allocated(npu) == before


def test_more_than_is_free(memory: NpuMemory, npu: Any) -> None:
    total = npu.mem_get_info(0)[1]
    allowed = 128 << 20
    npu.set_per_process_memory_fraction(allowed / total)
    try:
        before = allocated(npu)
        held = memory.allocate(1, (allowed // 2,), torch.uint8)
        with pytest.raises(LLMOutOfMemoryError, match="out of memory") as caught:
            memory.allocate(1, (allowed * 3 // 4,), torch.uint8)
        assert (caught.value.requested_bytes or 0) >= allowed * 3 // 4
        assert caught.value.free_bytes == npu.mem_get_info(0)[0]
        del held
        # The error that is still at hand must not keep anything.
        again = memory.allocate(1, (allowed * 3 // 4,), torch.uint8)
        del again
        assert allocated(npu) == before
    finally:
        npu.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(("count", "shape"), [(0, (4,)), (-1, (4,)), (1, (0, 4)), (1, (-4,))])
def test_nonsense_is_refused(memory: NpuMemory, count: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(LLMParamError, match=r"positive|at least 1"):
        memory.allocate(count, shape, torch.uint8)


# -- pools ----------------------------------------------------------------------------------------


def test_a_pool_is_taken_at_once_and_given_back(device: torch.device, npu: Any) -> None:
    before = allocated(npu)
    arena = pool(device, 8 << 20)
    held = allocated(npu) - before
    assert 8 << 20 <= held <= (8 << 20) + 2 * TWO_MIB
    assert arena.region.address % TWO_MIB == 0
    tensors = arena.allocate(3, (5, 1000), torch.float16).tensors
    assert allocated(npu) - before == held
    fill_all(tensors)
    check_all(tensors)
    last = tensors[2]
    del arena, tensors
    assert allocated(npu) - before == held
    last.fill_(2)
    assert last.sum().item() == 10000
    del last
    assert allocated(npu) == before


def test_pages_of_a_pool_are_used_again(device: torch.device) -> None:
    arena = pool(device, 1 << 20)
    first = arena.allocate(4, (1 << 17,), torch.int8).tensors
    assert arena.stats.free_bytes == 1 << 19
    with pytest.raises(LLMOutOfMemoryError, match="asked for 5 tensors") as caught:
        arena.allocate(5, (1 << 17,), torch.int8)
    assert caught.value.free_bytes == 1 << 19
    address = first[2].data_ptr()
    kept, first = first[:2], ()
    assert arena.stats.spans_in_use == len(kept)
    again = arena.allocate(6, (1 << 17,), torch.int8).tensors
    assert address in [tensor.data_ptr() for tensor in again]
    assert arena.stats.free_bytes == 0
    fill_all(again)
    check_all(again)


def test_a_pool_that_the_device_does_not_have(device: torch.device) -> None:
    with pytest.raises(LLMOutOfMemoryError):
        pool(device, 1 << 45)


# -- what was started earlier ---------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
def test_kernels_on_earlier_tensors_do_not_write_into_new_ones(
    memory: NpuMemory, device: torch.device, npu: Any, pooled: bool
) -> None:
    source = pool(device, 1 << 20) if pooled else memory
    (earlier,) = source.allocate(1, (1 << 19,), torch.uint8).tensors
    address = earlier.data_ptr()
    npu.synchronize()
    earlier.fill_(7)
    del earlier
    (tensor,) = source.allocate(1, (1 << 19,), torch.uint8).tensors
    assert tensor.data_ptr() == address
    # A transfer engine writes without regard to torch's streams; so does another stream.
    other = npu.Stream()
    with npu.stream(other):
        tensor.copy_(torch.full((1 << 19,), 9, dtype=torch.uint8))
    other.synchronize()
    npu.synchronize()
    assert tensor.cpu().unique().tolist() == [9]


# -- expandable segments --------------------------------------------------------------------------


@pytest.fixture
def expandable(npu: Any) -> Iterator[None]:
    npu.empty_cache()
    npu.memory._set_allocator_settings("expandable_segments:True")
    yield
    npu.empty_cache()
    npu.memory._set_allocator_settings("expandable_segments:False")


def is_expandable(tensor: torch.Tensor) -> bool:
    segment = segment_at(segments_of(tensor.device), tensor.data_ptr())
    assert segment is not None
    return segment.expandable


@pytest.mark.usefixtures("expandable")
@pytest.mark.parametrize("pooled", [False, True])
def test_expandable_segments(memory: NpuMemory, device: torch.device, pooled: bool) -> None:
    # Too large for what the allocator has already.
    mine = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    assert is_expandable(mine)
    source = pool(device, 8 << 20) if pooled else memory
    tensors = source.allocate(2, (1 << 20,), torch.float16).tensors
    assert not any(is_expandable(tensor) for tensor in tensors)
    fill_all(tensors)
    check_all(tensors)
    # The user's setting is as it was.
    assert is_expandable(torch.empty(96 << 20, dtype=torch.uint8, device=device))


@pytest.mark.usefixtures("expandable")
def test_registering_memory_in_expandable_segments(
    instance_factory, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    manager = instance_factory().cache_manager
    desc = CacheDesc(1, [4, 16 << 20], DataType.DT_UINT8)
    owner = torch.zeros(4, 16 << 20, dtype=torch.uint8, device=device)
    for given in ([owner], [owner.data_ptr()]):
        caplog.clear()
        cache = manager.register_blocks_cache(desc, given)
        assert "expandable segments" in caplog.text
        cache.tensors[0][3, :1000] += 2
        manager.unregister_cache(cache.cache_id)
    assert owner.cpu().sum(1).tolist() == [0, 0, 0, 4000]


# -- through the API ------------------------------------------------------------------------------


def test_caches_are_on_the_npu(instance_factory, npu: Any) -> None:
    manager = instance_factory().cache_manager
    before = allocated(npu)
    desc = CacheDesc(4, [3, 256], DataType.DT_FLOAT16)
    cache = manager.allocate_cache(desc, [CacheKey(1, 0, 0)])
    blocks = manager.allocate_blocks_cache(desc)
    for each in (cache, blocks):
        assert each.device == torch.device("npu:0")
        assert each.tensor_addrs == [tensor.data_ptr() for tensor in each.tensors]
        fill_all(each.tensors)
    check_all(cache.tensors)
    check_all(blocks.tensors)
    assert allocated(npu) > before
    manager.remove_cache_key(CacheKey(1, 0, 0))
    manager.deallocate_cache(cache)
    manager.deallocate_blocks_cache(blocks)
    assert allocated(npu) == before


def test_pools_through_the_api(instance_factory, npu: Any) -> None:
    before = allocated(npu)
    datadist = instance_factory(pool=4 << 20)
    held = allocated(npu)
    assert held - before >= 4 << 20
    manager = datadist.cache_manager
    cache = manager.allocate_cache(CacheDesc(2, [4, 1000], DataType.DT_FLOAT))
    tensors = cache.tensors
    assert tensors[0].device == torch.device("npu:0")
    assert allocated(npu) == held
    datadist.finalize()
    assert cache.ended
    fill_all(tensors)
    check_all(tensors)
    assert allocated(npu) == held
    del tensors, cache, manager
    assert allocated(npu) == before

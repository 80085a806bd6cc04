# SPDX-License-Identifier: Apache-2.0
"""Local copies when memory is gone, and from several threads."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from llm_datadist_torch import Cache, DataType
from tests.api.support import (
    KNE,
    PI,
    desc,
    host,
    map_pages,
    raises,
    raw,
    scramble,
    tensors_of,
    unmap,
    zeros,
)


@pytest.mark.host_memory_only
@pytest.mark.parametrize("how", ["all", "end"])
def test_freed_foreign_memory_is_an_error(world, how):
    nbytes = 16 * mmap.PAGESIZE
    shape = (4, nbytes // 4)
    description = desc(1, shape, DataType.DT_INT8)
    device = world.manager.allocate_blocks_cache(description)
    row = world.manager.allocate_cache(description)
    address = map_pages(nbytes)
    cpu = Cache.create_cpu_cache(host(1, shape, DataType.DT_INT8), [address])
    blocks = world.manager.register_blocks_cache(description, [address])
    rows = world.manager.register_cache(description, [address])
    calls = [
        lambda: world.manager.swap_blocks(cpu, device, {0: 1}),
        lambda: world.manager.swap_blocks(device, cpu, {0: 1}),
        lambda: world.manager.copy_blocks(blocks, {0: [1]}),
        lambda: world.manager.copy_cache(rows, row),
        lambda: world.manager.copy_cache(row, rows),
    ]
    for call in calls:
        call()
    if how == "all":
        unmap(address, nbytes)
    else:
        unmap(address + nbytes - mmap.PAGESIZE, mmap.PAGESIZE)
    for call in calls:
        with raises(PI, rf"addrs\[0\]={address:#x}.*no longer mapped"):
            call()


def test_a_resized_storage_is_an_error(world):
    """Somebody frees a registered tensor's memory behind our back."""
    mine = tensors_of(desc())
    cache = world.manager.register_blocks_cache(desc(), mine)
    mine[1].untyped_storage().resize_(0)
    with raises(KNE, "tensor 1 of cache .* has moved from 0x.* to nowhere"):
        world.manager.copy_blocks(cache, {0: [1]})


# -- threads --------------------------------------------------------------------------------------


def test_two_threads_copy_different_blocks(instance_factory):
    manager = instance_factory().cache_manager
    cache = manager.allocate_blocks_cache(desc(4, (64, 4096), DataType.DT_INT8))
    scramble(cache.tensors, 6)
    before = [raw(t) for t in cache.tensors]
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for step in range(200):
                shift = 1 + step % 15
                manager.copy_blocks(cache, {first + i: [first + 16 + i] for i in range(shift)})
            manager.copy_blocks(cache, {first + i: [first + 16 + i] for i in range(16)})
        except BaseException as error:  # noqa: BLE001 (reported below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for tensor, old in zip(cache.tensors, before, strict=True):
        half = 16 * 4096
        expected = old[:half] * 2 + old[2 * half : 3 * half] * 2
        assert raw(tensor) == expected


def test_ending_a_cache_while_others_copy(instance_factory):
    manager = instance_factory(pool=1 << 20).cache_manager
    strange: list[BaseException] = []

    def copy(cache: Cache) -> None:
        try:
            while not cache.ended:
                manager.copy_blocks(cache, {0: [1], 1: [2]})
        except Exception as error:  # noqa: BLE001 (judged below)
            if getattr(error, "status_code", None) != KNE:
                strange.append(error)

    for _ in range(30):
        cache = manager.allocate_blocks_cache(desc(2, (4, 4096), DataType.DT_INT8))
        threads = [threading.Thread(target=copy, args=(cache,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        manager.deallocate_blocks_cache(cache)
        for thread in threads:
            thread.join(30)
    assert not strange
    # What another thread took a moment ago may still be on its way out; then the pool is whole.
    assert manager.allocate_blocks_cache(desc(1, (1, 1 << 20), DataType.DT_INT8))


# -- two caches over the same memory --------------------------------------------------------------


@pytest.mark.host_memory_only
def test_swap_over_shared_memory(world):
    device = world.manager.register_blocks_cache(desc(), [*world.blk.tensors])
    cpu = Cache.create_cpu_cache(host(), [*world.blk.tensors])
    before = world.bytes()
    with raises(PI):
        world.manager.swap_blocks(cpu, device, {0: 0})
    assert world.bytes() == before
    world.manager.swap_blocks(cpu, device, {0: 1})
    assert torch.equal(world.blk.tensors[0][0], world.blk.tensors[0][1])


def test_copy_cache_over_memory_shared_in_part(world):
    memory = zeros(100)
    # Engines take memory that overlaps only within memory that they have.
    world.manager.register_cache(desc(1, (1, 100)), [memory.view(1, 100)])
    one = world.manager.register_cache(desc(1, (4, 8)), [memory[:32].view(4, 8)])
    other = world.manager.register_cache(desc(1, (4, 8)), [memory[4:36].view(4, 8)])
    memory[:36] = torch.arange(36)
    with raises(PI):
        world.manager.copy_cache(one, other)
    assert memory[:36].tolist() == list(range(36))
    world.manager.copy_cache(one, other, 0, 3)
    assert memory[:8].tolist() == list(range(28, 36))

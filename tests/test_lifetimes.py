# SPDX-License-Identifier: Apache-2.0
"""Who keeps memory alive, and when it goes: only the public API, and the kernel's view of it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMCacheNotFoundError,
    LLMClusterInfo,
    LLMDataDist,
    LLMOutOfMemoryError,
    LLMStatusCode,
    Placement,
)
from llm_datadist_torch.memory.npu_address import segment_at, segments_of
from tests.devices import default_device, examples, finish_kernels, on_npu
from tests.peers import Ref, eventually, spawn

MIB = 1 << 20
BLOCKS, WIDTH = 8, MIB // 8
DESC = CacheDesc(2, [BLOCKS, WIDTH], torch.uint8)  # 1 MiB per tensor
HOST = CacheDesc(2, [BLOCKS, WIDTH], torch.uint8, Placement.HOST)
IDS = list(range(BLOCKS))
LONG_MS = 20_000  # of a call, on the busiest machine
POOL = 4 * MIB
KINDS = ["allocated", "pool", "tensors", "strided"]


def pattern(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, WIDTH)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2)]


def link(here: LLMDataDist, there: LLMDataDist) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = there.cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(*there.listen_address)
    overall, _ = here.link_clusters([info], timeout=10_000)
    assert overall == LLMStatusCode.LLM_SUCCESS
    return info


def make(datadist: LLMDataDist, kind: str, expected: list[torch.Tensor]) -> Cache:
    """A blocks cache with this content; for ``pool`` the instance has one."""
    key, manager = BlocksCacheKey(datadist.cluster_id), datadist.cache_manager
    if kind in ("allocated", "pool"):
        cache = manager.allocate_blocks_cache(DESC, key)
    else:
        width = WIDTH if kind == "tensors" else WIDTH + 64
        given = [empty(BLOCKS, width)[:, :WIDTH] for _ in expected]
        cache = manager.register_blocks_cache(DESC, given, key)
    for tensor, data in zip(cache.tensors, expected, strict=True):
        tensor.copy_(data)
    finish_kernels()
    return cache


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=default_device())


def churn() -> list[torch.Tensor]:
    """Takes and dirties whatever memory has become free."""
    gc.collect()
    return [empty(BLOCKS, WIDTH).fill_(0xEE) for _ in range(16)]


def equal(tensors: Any, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(tensors, expected, strict=True))


def is_allocated(address: int) -> bool:
    """Whether the memory here is (part of) a shareable region, or of a tensor of an NPU's."""
    if on_npu():
        segment = segment_at(segments_of(default_device()), address)
        blocks = () if segment is None else segment.blocks
        return any(start <= address < end and used for start, end, used in blocks)
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return "memfd" in line
    return False


def resources() -> dict[str, int]:
    gc.collect()
    if on_npu():
        torch.npu.empty_cache()
    maps = Path("/proc/self/maps").read_text().splitlines()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "shared": sum("memfd:llm_datadist" in line for line in maps),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "rss_mib": pages * 4096 // MIB,
    }


@contextmanager
def no_leak(slack_mib: int = 48) -> Iterator[None]:
    before = resources()
    yield
    allowed = {"fds": 0, "shared": 0, "threads": 0, "rss_mib": slack_mib}
    assert eventually(
        lambda: all(now <= before[name] + allowed[name] for name, now in resources().items())
    ), (before, resources())


@contextmanager
def no_collector() -> Iterator[None]:
    """Memory has to go with the last reference, not when the collector happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- what nobody here refers to is still there for peers ------------------------------------------


@pytest.mark.parametrize("where", ["this process", "another process"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_is_right_when_every_reference_is_dropped(
    instance_factory: Any, kind: str, where: str
) -> None:
    owner = instance_factory(pool=POOL if kind == "pool" else None, timeout_ms=LONG_MS)
    expected = pattern(1)
    make(owner, kind, expected)  # nothing is kept of what it returns
    noise = churn()
    key = BlocksCacheKey(owner.cluster_id)
    if where == "this process":
        puller = instance_factory(timeout_ms=LONG_MS)
        link(puller, owner)
        target = puller.cache_manager.allocate_blocks_cache(DESC)
        puller.cache_manager.pull_blocks(key, target, IDS, IDS[::-1])
        assert equal([tensor.flip(0) for tensor in target.tensors], expected)
    else:
        peer = spawn()
        try:
            peer.call("start", 1)
            assert peer.call("link", owner.cluster_id, owner.listen_address[1])[0] == "LLM_SUCCESS"
            peer.call("allocate", "target", 2, BLOCKS, WIDTH, paged=True)
            assert peer.call("attempt", "pull_blocks", key, Ref("target"), IDS, IDS) is None
            data, starts = peer.call("dump", "target"), peer.call("span", "target").starts
            for start, tensor in zip(starts, expected, strict=True):
                assert data[start : start + MIB] == tensor.numpy().tobytes()
        finally:
            peer.close()
    assert len(noise) == 16


@pytest.mark.parametrize("as_ints", [False, True], ids=["tensors", "ints"])
def test_a_cpu_cache_keeps_its_tensors(instance_factory: Any, as_ints: bool) -> None:
    manager = instance_factory().cache_manager
    expected, given = pattern(4), pattern(4)
    kept = list(given) if as_ints else []  # what came as addresses stays ours to keep
    cpu = Cache.create_cpu_cache(HOST, [t.data_ptr() for t in given] if as_ints else given)
    del given
    noise = churn()
    target = manager.allocate_blocks_cache(DESC)
    manager.swap_blocks(cpu, target, {block: BLOCKS - 1 - block for block in IDS})
    assert equal([tensor.flip(0) for tensor in target.tensors], expected)
    assert (len(noise), len(kept)) == (16, 2 * as_ints)


def test_a_key_keeps_a_contiguous_cache(instance_factory: Any) -> None:
    """Deallocated and dropped, but named: the memory goes when the pull has consumed the key."""
    owner, puller = (instance_factory(timeout_ms=LONG_MS) for _ in range(2))
    link(puller, owner)
    desc = CacheDesc(2, [2, WIDTH], torch.uint8)
    cache = owner.cache_manager.allocate_cache(desc, [CacheKey(owner.cluster_id, 5)])
    expected = [tensor.random_(256).clone().cpu() for tensor in cache.tensors]
    address, cache_id = cache.tensor_addrs[0], cache.cache_id
    owner.cache_manager.deallocate_cache(cache)
    del cache
    noise = churn()
    assert is_allocated(address)
    target = puller.cache_manager.allocate_cache(desc)
    puller.cache_manager.pull_cache(CacheKey(owner.cluster_id, 5), target, batch_index=1)
    assert equal([t[1] for t in target.tensors], [t[0] for t in expected])
    assert eventually(lambda: not is_allocated(address))
    with pytest.raises(LLMCacheNotFoundError):
        puller.cache_manager.pull_cache(CacheKeyByIdAndIndex(owner.cluster_id, cache_id), target)
    assert len(noise) == 16


# -- any order of ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["allocated", "pool", "tensors"])
def test_every_order_of_ends(instance_factory: Any, kind: str) -> None:
    """Tensors stay right until they are dropped, whatever has ended before; nothing is left."""
    expected = pattern(5)

    def one(order: tuple[str, ...]) -> None:
        owner = instance_factory(pool=POOL if kind == "pool" else None, timeout_ms=LONG_MS)
        peer = instance_factory(timeout_ms=LONG_MS)
        link(peer, owner)
        held: dict[str, Any] = {
            "cache": make(owner, kind, expected),
            "manager": owner.cache_manager,
        }
        held["tensors"] = held["cache"].tensors
        held["target"] = peer.cache_manager.allocate_blocks_cache(DESC)
        key = BlocksCacheKey(owner.cluster_id)
        peer.cache_manager.pull_blocks(key, held["target"], IDS, IDS)
        for what in order:
            if what == "owner":
                owner.finalize()
            elif what == "peer":
                peer.finalize()
            elif what == "cache" and not held["cache"].ended:
                with held["cache"]:  # deallocates, or unregisters
                    pass
            held.pop(what, None)
            if "tensors" in held:
                assert equal(held["tensors"], expected), (order, what)
        held.clear()

    orders = list(itertools.permutations(["cache", "tensors", "manager", "owner", "peer"]))
    one(orders[0])
    with no_leak():
        for order in orders[:: len(orders) // examples(len(orders))]:
            one(order)


def test_many_lives_leave_nothing(instance_factory: Any) -> None:
    """Init, link, caches that are never deallocated, pulls both ways, finalize: again and again."""
    expected = pattern(6)

    def life() -> None:
        one, two = (instance_factory(timeout_ms=LONG_MS) for _ in range(2))
        link(one, two)
        for owner, puller, kind in ((one, two, "allocated"), (two, one, "strided")):
            make(owner, kind, expected)
            mine = puller.cache_manager.create_host_cache(HOST)
            puller.cache_manager.pull_blocks(BlocksCacheKey(owner.cluster_id), mine, IDS, IDS)
            assert equal(mine.tensors, expected)
        two.finalize()
        one.finalize()

    life()
    with no_leak():
        for _ in range(25):
            life()


# -- the last reference ---------------------------------------------------------------------------


def test_memory_goes_with_the_last_tensor(instance_factory: Any) -> None:
    manager = instance_factory().cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    address = cache.tensor_addrs[0]
    with no_collector():
        row = cache.tensors[1][3].view(torch.int32)  # a view of a view
        if not on_npu():
            row = row.numpy()  # not even a tensor
        row[:] = 77
        manager.deallocate_blocks_cache(cache)
        assert is_allocated(address)
        assert (row == 77).all()
        del row
        assert not is_allocated(address)


def test_memory_goes_with_deallocate_when_no_tensor_is_left(instance_factory: Any) -> None:
    manager = instance_factory().cache_manager
    with no_collector():
        cache = manager.allocate_blocks_cache(DESC)
        address = cache.tensor_addrs[0]
        cache.tensors[0].fill_(1)
        cache.block(2)
        manager.deallocate_blocks_cache(cache)
        assert not is_allocated(address)
        assert cache.tensor_addrs == []


@pytest.mark.parametrize("first", ["cache", "instance"])
def test_memory_goes_after_finalize(instance_factory: Any, first: str) -> None:
    datadist = instance_factory()
    with no_collector():
        cache = datadist.cache_manager.allocate_blocks_cache(DESC)
        address = cache.tensor_addrs[0]
        if first == "cache":
            del cache
            assert is_allocated(address)  # peers may still use it
        datadist.finalize()
        assert not is_allocated(address)


def test_a_pool_takes_its_pages_back(instance_factory: Any) -> None:
    """Each tensor on its own; the pool is whole again when the last one has gone."""
    datadist = instance_factory(pool=POOL)
    manager = datadist.cache_manager
    whole = CacheDesc(4, [1, MIB], torch.uint8)
    with no_collector():
        cache = manager.allocate_blocks_cache(whole)
        last = cache.tensors[2][:, ::4096]
        manager.deallocate_blocks_cache(cache)
        with pytest.raises(LLMOutOfMemoryError) as caught:
            manager.allocate_blocks_cache(whole)
        assert caught.value.free_bytes == 3 * MIB
        assert caught.value.largest_free_bytes == 2 * MIB
        del last, caught  # its traceback refers to the pool
        again = manager.allocate_blocks_cache(whole)
        address, kept = again.tensor_addrs[0], again.tensors[3]
        datadist.finalize()
        assert is_allocated(address)  # one region, held by the last tensor of it
        kept.fill_(1)
        del kept
        assert not is_allocated(address)


@pytest.mark.parametrize("end", ["unregister", "finalize"])
def test_registered_tensors_are_let_go(instance_factory: Any, end: str) -> None:
    datadist = instance_factory()
    manager = datadist.cache_manager
    with no_collector():
        with manager.allocate_blocks_cache(DESC) as source:
            given = list(source.tensors)  # their region shows in the kernel's list
        address = given[0].data_ptr()
        cache = manager.register_blocks_cache(DESC, given)
        del given
        assert is_allocated(address)
        if end == "unregister":
            manager.unregister_cache(cache.cache_id)
        else:
            datadist.finalize()
        assert cache.ended
        assert not is_allocated(address)


@pytest.mark.host_memory_only
def test_a_cpu_cache_lets_its_tensors_go(instance_factory: Any) -> None:
    manager = instance_factory().cache_manager
    with no_collector():
        with manager.create_host_cache(HOST) as source:
            cpu = Cache.create_cpu_cache(HOST, list(source.tensors))
        address = cpu.tensor_addrs[0]
        cpu.tensors[0].fill_(5)
        assert is_allocated(address)
        del cpu
        assert not is_allocated(address)

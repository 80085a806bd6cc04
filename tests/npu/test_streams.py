# SPDX-License-Identifier: Apache-2.0
"""What is in order with what: copies and transfers among kernels, streams, threads and devices.

The simulator's scheduler `lazy` runs nothing before somebody waits, so that here a wait that is
missing shows in the bytes. Two tests take one away, and see it show.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheManager,
    EventSynchronizer,
    LLMClusterInfo,
    LLMDataDist,
    LLMStatusCode,
    LLMTimeoutError,
    Placement,
    TransferConfig,
    ops,
)
from llm_datadist_torch.memory import streams
from llm_datadist_torch.memory.in_flight import InFlight
from llm_datadist_torch.values.environment import environment_text
from tests.peers import eventually

ROWS, WIDTH = 8, 4096
BUSY = 50  # kernels before the one that matters


def desc(placement: Placement = Placement.DEVICE) -> CacheDesc:
    return CacheDesc(2, [ROWS, WIDTH], torch.float16, placement)


class Pair:
    """Two linked instances; `key` names the first one's cache, `mine` belongs to the second."""

    def __init__(self, make: Callable[..., LLMDataDist], second_device: int = 0) -> None:
        self.owner = make()
        self.user = make(**{"ge.exec.deviceId": str(second_device)})
        info = LLMClusterInfo()
        info.remote_cluster_id = self.owner.cluster_id
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info(*self.owner.listen_address)
        assert self.user.link_clusters([info], timeout=10_000)[0] == LLMStatusCode.LLM_SUCCESS
        self.key = BlocksCacheKey(self.owner.cluster_id, 1)
        self.theirs = self.owner.cache_manager.allocate_blocks_cache(desc(), self.key)
        self.mine = self.user.cache_manager.allocate_blocks_cache(desc())
        for tensor in (*self.theirs.tensors, *self.mine.tensors):
            tensor.zero_()
        for index in range(torch.npu.device_count()):
            torch.npu.synchronize(index)

    @property
    def manager(self) -> CacheManager:
        return self.user.cache_manager


@pytest.fixture
def pair(instance_factory) -> Pair:
    return Pair(instance_factory)


def launch(cache: Cache, value: float) -> None:
    """Fill a cache by kernels of which the last ones matter."""
    for tensor in cache.tensors:
        for step in range(BUSY):
            tensor.fill_(-step)
        tensor.fill_(value)


def values(cache: Cache, row: int) -> list[float]:
    found = torch.stack([tensor[row].cpu() for tensor in cache.tensors])
    return sorted(set(found.flatten().tolist()))


# -- transfers -------------------------------------------------------------------------------------


def test_a_push_comes_after_the_current_stream(pair: Pair) -> None:
    launch(pair.mine, 7)
    pair.manager.push_blocks(pair.key, pair.mine, [1], [2])
    assert values(pair.theirs, 2) == [7]


@pytest.mark.needs_simulated_npu
def test_without_the_wait_a_push_sends_what_is_not_there_yet(pair: Pair, monkeypatch) -> None:
    """The broken variant: what the test above is for shows."""
    monkeypatch.setattr(streams.StreamPoint, "wait", lambda self, deadline: None)
    launch(pair.mine, 7)
    pair.manager.push_blocks(pair.key, pair.mine, [1], [2])
    assert values(pair.theirs, 2) != [7]


def test_a_background_push_comes_after_what_was_launched_before_the_call(pair: Pair) -> None:
    launch(pair.mine, 7)
    task = pair.manager.push_blocks_async(pair.key, pair.mine, [1], [2])
    assert task.synchronize(10_000) == LLMStatusCode.LLM_SUCCESS
    assert values(pair.theirs, 2) == [7]


@pytest.mark.parametrize("background", [False, True])
def test_wait_stream(pair: Pair, npu: Any, background: bool) -> None:
    stream = npu.Stream()
    with npu.stream(stream):
        launch(pair.mine, 9)
    if background:
        task = pair.manager.push_blocks_async(pair.key, pair.mine, [1], [2], wait_stream=stream)
        assert task.synchronize(10_000) == LLMStatusCode.LLM_SUCCESS
    else:
        pair.manager.push_blocks(pair.key, pair.mine, [1], [2], wait_stream=stream)
    assert values(pair.theirs, 2) == [9]


@pytest.mark.parametrize("bad", [1, "stream", torch.device("cpu")])
def test_wait_stream_must_be_a_stream(pair: Pair, bad: Any) -> None:
    for call in (pair.manager.push_blocks, pair.manager.push_blocks_async):
        with pytest.raises(TypeError, match="wait_stream"):
            call(pair.key, pair.mine, [1], [2], wait_stream=bad)


def test_a_pull_is_there_for_every_stream(pair: Pair, npu: Any) -> None:
    launch(pair.theirs, 3)
    npu.synchronize()
    launch(pair.mine, 1)  # writes to the destination that come first
    pair.manager.pull_blocks(pair.key, pair.mine, [0, 5], [4, 6])
    with npu.stream(npu.Stream()):
        copied = [tensor.clone() for tensor in pair.mine.tensors]
        npu.current_stream().synchronize()
    for tensor in copied:
        assert tensor[4].cpu().unique().tolist() == tensor[6].cpu().unique().tolist() == [3]
        assert tensor[5].cpu().unique().tolist() == [1]


def test_a_host_cache_waits_for_the_npu_in_use(pair: Pair) -> None:
    """Copies out of the device may be on their way into it."""
    host = pair.manager.allocate_blocks_cache(desc(Placement.HOST))
    launch(pair.mine, 5)
    pair.manager.swap_blocks(pair.mine, host, {0: 3}, non_blocking=True)
    pair.manager.push_blocks(pair.key, host, [3], [1])
    assert values(pair.theirs, 1) == [5]


def test_a_stream_that_does_not_get_done(pair: Pair) -> None:
    class Never(torch.Stream):
        def record_event(self, event: Any = None) -> Any:
            return self

        def query(self) -> bool:
            return False

    stuck = Never(torch.device("npu:0"))
    with pytest.raises(LLMTimeoutError, match="the stream did not get done in 50 ms"):
        pair.manager.push_blocks(pair.key, pair.mine, [1], [2], wait_stream=stuck, timeout=50)
    pair.manager.push_blocks(pair.key, pair.mine, [1], [2])


@pytest.mark.parametrize("placement", list(Placement))
def test_from_another_device(instance_factory, npu: Any, placement: Placement) -> None:
    pair = Pair(instance_factory, second_device=1)
    mine = pair.manager.allocate_blocks_cache(desc(placement))
    launch(pair.theirs, 4)
    npu.synchronize(0)
    pair.manager.pull_blocks(pair.key, mine, [0, 1, 7], [1, 2, 4])
    assert [values(mine, row) for row in (1, 2, 4)] == [[4]] * 3
    with npu.device(1):
        launch(mine, 6)
        pair.manager.push_blocks(pair.key, mine, [3], [5])
    assert values(pair.theirs, 5) == [6]
    assert values(pair.theirs, 4) == [4]
    assert npu.current_device() == 0


def test_event_synchronizer_with_npu_events(pair: Pair, npu: Any) -> None:
    ready = EventSynchronizer([npu.Event()])
    target = TransferConfig(pair.owner.cluster_id, pair.theirs.tensor_addrs, range(1))
    task = pair.manager.transfer_cache_async(pair.mine, ready, [target], [1], [2])
    launch(pair.mine, 8)
    ready.record(0)
    assert task.synchronize(10_000) == LLMStatusCode.LLM_SUCCESS
    assert values(pair.theirs, 2) == [8]


# -- local copies ----------------------------------------------------------------------------------


@pytest.fixture
def manager(instance_factory) -> CacheManager:
    return instance_factory().cache_manager


def test_copies_are_complete_on_return(manager: CacheManager) -> None:
    device = manager.allocate_blocks_cache(desc())
    host = manager.allocate_blocks_cache(desc(Placement.HOST))
    launch(device, 2)
    manager.copy_blocks(device, {0: [1, 2]})
    manager.swap_blocks(device, host, {1: 5})
    assert values(host, 5) == [2]
    host.tensors[0].fill_(3)
    manager.swap_blocks(host, device, {5: 7})
    host.tensors[0].fill_(4)
    assert device.tensors[0][7].cpu().unique().tolist() == [3]


@pytest.mark.needs_simulated_npu
def test_without_a_wait_a_copy_that_does_not_block_is_not_there_yet(
    manager: CacheManager, monkeypatch
) -> None:
    monkeypatch.setattr(streams, "in_flight", InFlight())
    monkeypatch.setattr(streams.in_flight, "_watch", lambda: None)
    device = manager.allocate_blocks_cache(desc())
    host = manager.allocate_blocks_cache(desc(Placement.HOST))
    for tensor in host.tensors:
        tensor.fill_(1)
    launch(device, 2)
    manager.swap_blocks(device, host, {1: 5}, non_blocking=True)
    if environment_text("ASCEND_SIM_SCHEDULER") == "lazy":
        assert values(host, 5) == [1]
    torch.npu.synchronize()
    assert values(host, 5) == [2]


def test_copies_that_do_not_block_are_in_order_with_kernels(manager: CacheManager) -> None:
    device = manager.allocate_blocks_cache(desc())
    host = manager.allocate_blocks_cache(desc(Placement.HOST))
    rows = CacheDesc(2, [2, WIDTH], torch.float16)
    first, second = (manager.allocate_cache(rows) for _ in range(2))
    launch(device, 2)
    manager.copy_blocks(device, {0: [1]}, non_blocking=True)
    for tensor in device.tensors:
        tensor[0].fill_(9)
    manager.swap_blocks(device, host, {1: 5, 0: 6}, non_blocking=True)
    launch(device, 4)
    launch(first, 5)
    manager.copy_cache(second, first, 1, 0, non_blocking=True)
    launch(first, 6)
    torch.npu.synchronize()
    assert [values(host, 5), values(host, 6), values(second, 1)] == [[2], [9], [5]]


def test_caches_that_end_meanwhile_keep_their_memory(manager: CacheManager) -> None:
    device = manager.allocate_blocks_cache(desc())
    host = manager.allocate_blocks_cache(desc(Placement.HOST))
    kept = host.tensors
    launch(device, 2)
    manager.swap_blocks(device, host, {1: 5}, non_blocking=True)
    manager.deallocate_blocks_cache(device)
    manager.deallocate_blocks_cache(host)
    others = [manager.allocate_blocks_cache(desc()) for _ in range(3)]
    for other in others:
        launch(other, 8)
    torch.npu.synchronize()
    assert kept[0][5].unique().tolist() == kept[1][5].unique().tolist() == [2]
    assert eventually(lambda: len(streams.in_flight) == 0)


def test_unregister_waits_for_the_copy(manager: CacheManager) -> None:
    tensors = [torch.zeros(ROWS, WIDTH, dtype=torch.float16).pin_memory() for _ in range(2)]
    host = manager.register_blocks_cache(desc(Placement.HOST), tensors)
    device = manager.allocate_blocks_cache(desc())
    launch(device, 2)
    manager.swap_blocks(device, host, {1: 5}, non_blocking=True)
    manager.unregister_cache(host.cache_id)
    assert tensors[0][5].unique().tolist() == [2]


def test_host_tensors_live_until_the_copy_is_done(npu: Any) -> None:
    device = torch.zeros(4, 1 << 16, device="npu:0")
    host = torch.ones(4, 1 << 16).pin_memory()
    gone = weakref.ref(host)
    ops.swap_blocks([device], [host], [0], [1], non_blocking=True)
    del host
    # The allocator of pinned memory gives what it gets back to the next who asks.
    others = [torch.full((4, 1 << 16), 5.0).pin_memory() for _ in range(3)]
    npu.synchronize()
    assert device.cpu()[0].unique().tolist() == [1]
    assert eventually(lambda: (gc.collect(), gone() is None)[1])
    del others


def test_device_tensors_live_until_another_stream_is_done(npu: Any) -> None:
    """Their memory goes back to the stream that they were made on, which may use it at once."""
    host = torch.zeros(4, 1 << 16).pin_memory()
    tensor = torch.full((4, 1 << 16), 3.0, device="npu:0")
    npu.synchronize()
    with npu.stream(npu.Stream()):
        ops.swap_blocks([host], [tensor], [0], [1], non_blocking=True)
    del tensor
    overwritten = torch.full((4, 1 << 16), 4.0, device="npu:0")
    npu.synchronize()
    assert host[0].unique().tolist() == [3]
    del overwritten


def test_finalize_with_copies_under_way(instance_factory) -> None:
    instance = instance_factory()
    device = instance.cache_manager.allocate_blocks_cache(desc())
    host = instance.cache_manager.allocate_blocks_cache(desc(Placement.HOST))
    kept = host.tensors
    launch(device, 2)
    instance.cache_manager.swap_blocks(device, host, {1: 5}, non_blocking=True)
    instance.finalize()
    torch.npu.synchronize()
    assert kept[0][5].unique().tolist() == [2]
    assert eventually(lambda: len(streams.in_flight) == 0)


def test_threads_with_streams_of_their_own(manager: CacheManager, npu: Any) -> None:
    host = manager.allocate_blocks_cache(desc(Placement.HOST))
    errors: list[Exception] = []

    def work(row: int) -> None:
        try:
            cache = manager.allocate_blocks_cache(desc())
            npu.set_device(0)
            with npu.stream(npu.Stream()):
                for step in range(5):
                    launch(cache, row + step)
                    manager.swap_blocks(cache, host, {0: row})
                    assert values(host, row) == [row + step]
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors

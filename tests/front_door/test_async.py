# SPDX-License-Identifier: Apache-2.0
"""``pull_async`` and ``push_async``: cancelling the coroutine cancels the transfer."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch.api.cache_manager import CacheManager
from tests.front_door.conftest import OpenNode
from tests.front_door.service import paint, values

SIZE = {"layers": 1, "blocks": 4, "shape": (4,), "dtype": torch.int32}


@pytest.fixture
def linked(processes, open_node: OpenNode):
    far = processes()
    address = far.call("open", cluster_id=1)
    far.call("allocate", name="kv", **SIZE)
    node = open_node()
    cache = node.allocate(**SIZE)
    paint(cache, plus=10_000)
    return far, cache, node.connect(address)


def test_pull_and_push(linked):
    far, cache, peer = linked

    async def both() -> None:
        await asyncio.gather(
            peer.pull_async("kv", cache, [1], [0]), peer.pull_async("kv", cache, [2], [1])
        )
        await peer.push_async("kv", cache, [3], [3])

    asyncio.run(both())
    assert values(cache)[0] == [1, 2, 10_002, 10_003]
    assert far.call("data")[0][48:] == cache.tensors[0][3].cpu().numpy().tobytes()


def test_errors(linked):
    _, cache, peer = linked
    with pytest.raises(ld.LLMCacheNotFoundError):
        asyncio.run(peer.pull_async("other", cache))
    with pytest.raises(ld.LLMParamError):
        asyncio.run(peer.pull_async("kv", cache, [1, 2], [0]))


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[ld.CacheTask]:
    """The tasks that pulls in the background are."""
    made: list[ld.CacheTask] = []
    start = CacheManager.pull_blocks_async

    def noted(*args: object, **kwargs: object) -> ld.CacheTask:
        made.append(start(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(CacheManager, "pull_blocks_async", noted)
    return made


def test_cancelling_ends_the_transfer_before_it_returns(linked, tasks):
    far, cache, peer = linked
    with far.stopped():
        # The owner answers nobody, so that the transfer is under way until its limit.

        async def cancelled() -> None:
            task = asyncio.create_task(peer.pull_async("kv", cache, [1], timeout_s=2.0))
            while not tasks:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # once more, while it waits for the end
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancelled())
        assert tasks[0].done()
    assert values(cache)[0] == [10_000, 10_001, 10_002, 10_003]


def test_a_queued_transfer_never_starts(linked, tasks):
    far, cache, peer = linked

    async def cancelled() -> None:
        first = [
            asyncio.create_task(peer.pull_async("kv", cache, [1], timeout_s=3)) for _ in range(8)
        ]
        while len(tasks) < 8:
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.pull_async("kv", cache, [2], timeout_s=60), 0.2)
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)

    with far.stopped():
        asyncio.run(cancelled())
    assert tasks[8].cancelled()
    assert values(cache)[0][2] == 10_002


def test_the_event_loop_goes_on(linked):
    far, cache, peer = linked
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.01)

    async def run() -> None:
        heart = asyncio.create_task(beat())
        threading.Timer(0.5, far.signal, [18]).start()
        await peer.pull_async("kv", cache, [1], timeout_s=20)
        heart.cancel()

    far.signal(19)
    asyncio.run(run())
    assert beats > 5
    assert values(cache)[0][1] == 1

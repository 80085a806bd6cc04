# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes in the background, and processes that end while there is some."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMCacheNotFoundError,
    LLMParamError,
)
from tests.asynchronous.helpers import KNE, NYL, PEER, PI, SUCCESS, WAIT_MS, Far, Source
from tests.peers import Service, eventually

ROOT = Path(__file__).parents[2]


def old(far: Far, name: str, tensor: int, at: int, nbytes: int) -> bytes:
    start = far.spans[name].starts[tensor] + at
    return far.before[name][start : start + nbytes]


def expect_here(here: Service, source: Source, *patches: tuple[int, int, bytes]) -> None:
    wanted = bytearray(source.data)
    for tensor, at, data in patches:
        start = source.span.starts[tensor] + at
        wanted[start : start + len(data)] = data
    assert here.dump("mine") == bytes(wanted)


def test_pull_cache_async(here: Service, far: Far) -> None:
    cache_id = far.make("allocated", "theirs", 4, 2, 16, paged=False, keys=(CacheKey(PEER, 5),))
    mine = Source(here, "mine", 4, 2, 16, paged=False)
    task = here.manager.pull_cache_async(
        CacheKeyByIdAndIndex(PEER, cache_id, 1),
        mine.cache,
        1,
        16,
        src_layer_range=range(1, 2),
        dst_layer_range=range(1),
    )
    assert task.get_results(WAIT_MS) == [SUCCESS]
    assert (task.layers_done, task.layers_total) == (1, 1)
    expect_here(here, mine, *[(t, 16, old(far, "theirs", t + 2, 16, 16)) for t in range(2)])
    # A key is consumed, as by pull_cache.
    assert here.manager.pull_cache_async(CacheKey(PEER, 5), mine.cache).synchronize(WAIT_MS) == 0
    assert eventually(lambda: far.call("counters")["keys"] == 0)
    again = here.manager.pull_cache_async(CacheKey(PEER, 5), mine.cache)
    assert again.synchronize(WAIT_MS) == KNE
    assert isinstance(again.exception(), LLMCacheNotFoundError)
    assert again.layers_done == 0


def test_pull_blocks_async(here: Service, far: Far) -> None:
    far.make("allocated", "theirs", 2, 4, 16, paged=True, keys=BlocksCacheKey(PEER, 1))
    mine = Source(here, "mine", 2, 4, 16, paged=True)
    blocks = [3, 0]
    task = here.manager.pull_blocks_async(BlocksCacheKey(PEER, 1), mine.cache, blocks, [1, 2])
    blocks[:] = [9, 9]
    assert task.get_results(WAIT_MS) == [SUCCESS]
    pairs = [(3, 1), (0, 2)]
    moved = [(t, d * 16, old(far, "theirs", t, s * 16, 16)) for t in range(2) for s, d in pairs]
    expect_here(here, mine, *moved)


def test_push_cache_async(here: Service, far: Far) -> None:
    cache_id = far.make("tensors", "theirs", 4, 3, 16, paged=False)
    mine = Source(here, "mine", 4, 2, 16, paged=False)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 2)
    task = here.manager.push_cache_async(key, mine.cache, 1, range(1), range(1, 2))
    assert task.get_results(WAIT_MS) == [SUCCESS]
    far.expect("theirs", *[(t + 2, 32, mine.part(t, 16, 16)) for t in range(2)])


def test_push_blocks_async(here: Service, far: Far) -> None:
    far.make("allocated", "theirs", 2, 4, 16, paged=True, keys=BlocksCacheKey(PEER, 1))
    mine = Source(here, "mine", 2, 4, 16, paged=True)
    task = here.manager.push_blocks_async(BlocksCacheKey(PEER, 1), mine.cache, (3,), (1,))
    assert task.get_results(WAIT_MS) == [SUCCESS]
    far.expect("theirs", *[(t, 16, mine.part(t, 48, 16)) for t in range(2)])


def test_arguments_are_refused_at_once(here: Service) -> None:
    mine = Source(here, "mine", 2, 4, 16, paged=True)
    manager, key = here.manager, BlocksCacheKey(PEER, 1)
    with pytest.raises(LLMParamError):
        manager.pull_blocks_async(key, mine.cache, [0], [])
    with pytest.raises(LLMParamError):
        manager.push_blocks_async(key, mine.cache, [0], [])
    with pytest.raises(AttributeError):
        manager.push_blocks_async(None, mine.cache, [0], [0])
    with pytest.raises(TypeError):
        manager.pull_cache_async(None, mine.cache)
    with pytest.raises(TypeError):
        manager.push_cache_async(None, mine.cache)


def test_the_rest_is_reported(here: Service, far: Far) -> None:
    mine = Source(here, "mine", 2, 4, 16, paged=True)
    far.make("allocated", "theirs", 2, 4, 12, paged=True, keys=BlocksCacheKey(PEER, 1))

    def pull(peer: int, model: int, *blocks: Any) -> Any:
        key = BlocksCacheKey(peer, model)
        return here.manager.pull_blocks_async(key, mine.cache, *blocks).get_results(WAIT_MS)

    assert pull(PEER, 1, [0], [0]) == [PI]  # another block size
    assert pull(PEER, 1, [0, 1], [0]) == [PI]
    assert pull(PEER, 2, [0], [0]) == [KNE]
    assert pull(1, 1, [0], [0]) == [PI]  # this very instance
    assert pull(9, 1, [0], [0]) == [NYL]
    here.drop("mine")
    assert pull(PEER, 1, [0], [0]) == [KNE]
    assert here.counters()["leases"] == 0


def test_many_at_once_with_asyncio(here: Service, far: Far) -> None:
    far.make("allocated", "theirs", 2, 40, 16, paged=True, keys=BlocksCacheKey(PEER, 1))
    mine = Source(here, "mine", 2, 40, 16, paged=True)
    key = BlocksCacheKey(PEER, 1)

    async def everything() -> list[Any]:
        pulls = [here.manager.pull_blocks_async(key, mine.cache, [i], [i]) for i in range(40)]
        return await asyncio.gather(*pulls)

    assert asyncio.run(everything()) == [SUCCESS] * 40
    moved = [(t, i * 16, old(far, "theirs", t, i * 16, 16)) for t in range(2) for i in range(40)]
    expect_here(here, mine, *moved)


def test_awaiting_a_failed_pull_raises(here: Service, far: Far) -> None:
    mine = Source(here, "mine", 2, 4, 16, paged=False)

    async def pull() -> None:
        await here.manager.pull_cache_async(CacheKey(PEER, 77), mine.cache)

    with pytest.raises(LLMCacheNotFoundError):
        asyncio.run(pull())


HANGING = """
import sys, threading
from llm_datadist_torch import *
config = LLMConfig()
config.enable_cache_manager = True
config.listen_ip_info = "127.0.0.1:0"
datadist = LLMDataDist(LLMRole.MIX, 1)
datadist.init(config.generate_options())
manager = datadist.cache_manager
cache = manager.allocate_cache(CacheDesc(2, [1, 16], DataType.DT_UINT8))
entered = threading.Event()

class Hangs(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        entered.set()
        threading.Event().wait()

key = CacheKeyByIdAndIndex(2, 1)
target = TransferWithCacheKeyConfig(key, range(1), range(1))
tasks = [manager.transfer_cache_async(cache, Hangs(), [target]) for _ in range(3)]
assert entered.wait(60)
ENDING
print("left")
"""


@pytest.mark.parametrize(
    "ending",
    ["", "datadist.finalize()", "del datadist, manager, cache", "tasks[0].cancel()"],
    ids=["nothing", "finalize", "del", "cancel"],
)
@pytest.mark.whole_programs
def test_a_process_ends_while_a_synchronizer_hangs(ending: str) -> None:
    """Section 14, 33: the reference can't exit."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING.replace("ENDING", ending)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "left"  # torch_npu may have said something before
    assert "Fatal" not in done.stderr

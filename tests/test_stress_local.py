# SPDX-License-Identifier: Apache-2.0
"""Many threads, two instances in one process, every local operation at random.

Each thread has caches of its own, and knows every byte that they must hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    LLMClusterInfo,
    LLMDataDist,
    LLMOutOfMemoryError,
    LLMStatusCode,
    Placement,
)
from tests.api.support import counters, regions
from tests.peers import eventually

pytestmark = pytest.mark.thorough

THREADS, STEPS = 6, 800
COUNT, ROWS, WIDTH = 2, 12, 8192
POOL = 1 << 20  # bytes, of each of the four pools
IDLE, BUSY = 4, 8  # caches that a thread has at least and at most, where memory allows


@dataclass(eq=False)
class Owned:
    """A cache, the instance it belongs to, its name for peers, and what it must hold."""

    home: LLMDataDist
    cache: Cache
    key: BlocksCacheKey | None
    expected: torch.Tensor  # uint8 [COUNT, ROWS, WIDTH]


class Worker:
    """One thread's random walk. ``done`` says which operations really happened, and how often."""

    def __init__(self, number: int, instances: list[LLMDataDist]) -> None:
        self.rng = random.Random(number)
        self.noise = torch.Generator().manual_seed(number)
        self.instances = instances
        self.names = iter(range(number << 20, (number + 1) << 20))
        self.owned: list[Owned] = []
        self.done: dict[str, int] = {}

    def run(self) -> dict[str, int]:
        operations = [self.allocate, self.register, self.copy, self.swap, self.pull, self.push]
        for step in range(STEPS):
            few, many = len(self.owned) < IDLE, len(self.owned) >= BUSY
            operation: Callable[[], Any] = self.rng.choice(operations)
            if few:
                operation = self.rng.choice(operations[:2])
            elif many or self.rng.random() < 0.1:
                operation = self.end
            try:
                happened = operation()
            except LLMOutOfMemoryError:  # the pools are too small for all, on purpose
                operation, happened = self.end, bool(self.owned) and self.end()
                self.count("out of memory")
            if happened:
                self.count(operation.__name__)
            if step % 10 == 0:
                for owned in self.owned:
                    self.check(owned)
        while self.owned:
            self.end()
        return self.done

    def count(self, name: str) -> None:
        self.done[name] = self.done.get(name, 0) + 1

    def check(self, owned: Owned) -> None:
        assert torch.equal(torch.stack(owned.cache.tensors), owned.expected), owned.cache

    # -- operations; each says whether it found caches to work with -------------------------------

    def new(self, placement: Placement) -> tuple[LLMDataDist, CacheDesc, BlocksCacheKey | None]:
        home = self.rng.choice(self.instances)
        desc = CacheDesc(COUNT, [ROWS, WIDTH], torch.uint8, placement)
        return home, desc, BlocksCacheKey(home.cluster_id, next(self.names))

    def keep(self, home: LLMDataDist, cache: Cache, key: BlocksCacheKey | None) -> bool:
        shape = (COUNT, ROWS, WIDTH)
        expected = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.noise)
        for tensor, data in zip(cache.tensors, expected, strict=True):
            tensor.copy_(data)
        self.owned.append(Owned(home, cache, key, expected))
        return True

    def allocate(self) -> bool:
        home, desc, key = self.new(self.rng.choice(list(Placement)))
        return self.keep(home, home.cache_manager.allocate_blocks_cache(desc, key), key)

    def register(self) -> bool:
        home, desc, key = self.new(Placement.DEVICE)
        given = [torch.empty(ROWS, WIDTH + 64, dtype=torch.uint8)[:, :WIDTH] for _ in range(COUNT)]
        return self.keep(home, home.cache_manager.register_blocks_cache(desc, given, key), key)

    def end(self) -> bool:
        owned = self.owned.pop(self.rng.randrange(len(self.owned)))
        self.check(owned)
        tensors = owned.cache.tensors
        with owned.cache:  # deallocates, or unregisters
            pass
        assert torch.equal(torch.stack(tensors), owned.expected)  # ours as long as we hold them
        return True

    def copy(self) -> bool:
        """Chains, cycles and fan-out: all sources are those before the call."""
        owned = self.rng.choice(self.owned)
        targets = self.rng.sample(range(ROWS), self.rng.randint(1, ROWS))
        pairs = [(self.rng.randrange(ROWS), target) for target in targets]
        owned.home.cache_manager.copy_blocks(owned.cache, torch.tensor(pairs))
        owned.expected[:, targets] = owned.expected[:, [source for source, _ in pairs]]
        return True

    def pair(self, fits: Callable[[Owned, Owned], bool]) -> tuple[Owned, Owned] | None:
        pairs = [(a, b) for a in self.owned for b in self.owned if a is not b and fits(a, b)]
        return self.rng.choice(pairs) if pairs else None

    def ids(self) -> tuple[list[int], list[int]]:
        count = self.rng.randint(1, ROWS)
        return self.rng.choices(range(ROWS), k=count), self.rng.sample(range(ROWS), count)

    def moved(self, src: Owned, src_ids: list[int], dst: Owned, dst_ids: list[int]) -> bool:
        dst.expected[:, dst_ids] = src.expected[:, src_ids]
        self.check(dst)
        return True

    def swap(self) -> bool:
        def fits(a: Owned, b: Owned) -> bool:
            return a.home is b.home and a.cache.cache_desc.placement != b.cache.cache_desc.placement

        if (found := self.pair(fits)) is None:
            return False
        src, dst = found
        src_ids, dst_ids = self.ids()
        pairs = torch.tensor([src_ids, dst_ids]).T
        src.home.cache_manager.swap_blocks(src.cache, dst.cache, pairs)
        return self.moved(src, src_ids, dst, dst_ids)

    def pull(self) -> bool:
        if (found := self.pair(lambda a, b: a.home is not b.home)) is None:
            return False
        src, dst = found
        src_ids, dst_ids = self.ids()
        dst.home.cache_manager.pull_blocks(src.key, dst.cache, src_ids, dst_ids)
        return self.moved(src, src_ids, dst, dst_ids)

    def push(self) -> bool:
        if (found := self.pair(lambda a, b: a.home is not b.home)) is None:
            return False
        src, dst = found
        src_ids, dst_ids = self.ids()
        src.home.cache_manager.push_blocks(dst.key, src.cache, src_ids, dst_ids)
        return self.moved(src, src_ids, dst, dst_ids)


@pytest.mark.parametrize("pools", [True, False], ids=["pools", "no-pools"])
def test_random_work_in_many_threads(instance_factory: Any, pools: bool) -> None:
    before = regions()
    sizes = {"pool": POOL, "host_pool": POOL} if pools else {}
    instances = [instance_factory(timeout_ms=60_000, **sizes) for _ in range(2)]
    one, two = instances
    info = LLMClusterInfo()
    info.remote_cluster_id = two.cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(*two.listen_address)
    assert one.link_clusters([info], timeout=10_000)[0] == LLMStatusCode.LLM_SUCCESS
    empty = [counters(instance) for instance in instances]

    workers = [Worker(number, instances) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as executor:
        all_done = list(executor.map(Worker.run, workers))

    wanted = {"allocate", "register", "copy", "swap", "pull", "push", "end"}
    for done in all_done:
        assert done.keys() >= wanted, done
    assert any("out of memory" in done for done in all_done) == pools
    assert sum(done["pull"] + done["push"] for done in all_done) > 30 * THREADS
    # The owner hears of the end of the last leases a moment later.
    assert eventually(lambda: [counters(instance) for instance in instances] == empty)
    if pools:  # they are whole again
        for instance in instances:
            for placement in Placement:
                desc = CacheDesc(1, [1, POOL], torch.uint8, placement)
                with instance.cache_manager.allocate_blocks_cache(desc):
                    pass
    for instance in instances:
        instance.finalize()
    assert eventually(lambda: regions() == before)

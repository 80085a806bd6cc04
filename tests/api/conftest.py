# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the API tests."""

from __future__ import annotations

import pytest

from llm_datadist_torch import Cache, CacheManager, DataType
from tests.api.support import desc, host, raw, scramble, tensors_of


class World:
    """Caches of every kind, for calls that must fail."""

    def __init__(self, manager: CacheManager, other: CacheManager) -> None:
        self.manager = manager
        self.con = manager.allocate_cache(desc())  # 2 x [4, 8] int32
        self.con2 = manager.allocate_cache(desc(2, (3, 4)))
        self.con3 = manager.allocate_cache(desc(3))
        self.blk = manager.allocate_blocks_cache(desc())
        self.blk3 = manager.allocate_blocks_cache(desc(3))
        self.dim1 = manager.allocate_cache(desc(batch_dim_index=1))
        self.bdim1 = manager.allocate_blocks_cache(desc(batch_dim_index=1))
        self.hblk = manager.allocate_blocks_cache(host())
        self.hblk3 = manager.allocate_blocks_cache(host(3))
        self.hwide = manager.allocate_blocks_cache(host(2, (4, 16)))
        self.hsame = manager.allocate_blocks_cache(host(2, (6, 32), DataType.DT_INT8))
        self.hcon = manager.allocate_cache(host())
        self.cpu = Cache.create_cpu_cache(host(), tensors_of(host()))
        self.yours = other.allocate_cache(desc())
        self.yblk = other.allocate_blocks_cache(desc())
        self.gone = manager.allocate_cache(desc())
        self.bgone = manager.allocate_blocks_cache(desc())
        self.hgone = manager.allocate_blocks_cache(host())
        for cache in (self.gone, self.bgone, self.hgone):
            with cache:
                pass
        self.caches = [c for c in vars(self).values() if isinstance(c, Cache) and not c.ended]
        for seed, cache in enumerate(self.caches):
            scramble(cache.tensors, seed)

    def bytes(self) -> list[bytes]:
        return [raw(tensor) for cache in self.caches for tensor in cache.tensors]


@pytest.fixture
def world(instance_factory):
    return World(instance_factory().cache_manager, instance_factory().cache_manager)

# SPDX-License-Identifier: Apache-2.0
"""Processes with many instances each: what hundreds of peers are made of on one machine."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Sequence
from pathlib import Path

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
)
from tests.conftest import make_options
from tests.peers import Failure, Service, cluster

DESC = CacheDesc(2, [2, 64], DataType.DT_UINT8)


def colour_of(number: int) -> int:
    """What the block of an instance is filled with."""
    return number % 251


def block(datadist: LLMDataDist, number: int) -> Cache:
    """A small blocks cache with the key and the colour of ``number``."""
    key = BlocksCacheKey(datadist.cluster_id, 0)
    cache = datadist.cache_manager.allocate_blocks_cache(DESC, key)
    for tensor in cache.tensors:
        tensor.fill_(colour_of(number))
    return cache


def infos(addresses: Sequence[tuple[int, int]]) -> list[LLMClusterInfo]:
    return [cluster(peer, port) for peer, port in addresses]


class Many(Service):
    """Many instances, besides the one of a service."""

    def start_many(self, first: int, count: int, **options: str) -> list[tuple[int, int]]:
        """Start instances; returns the id and port of each."""
        self.many = [LLMDataDist(LLMRole.MIX, first + number) for number in range(count)]
        self.caches = []
        for datadist in self.many:
            datadist.init(make_options(device="cpu", **options))
            self.caches.append(block(datadist, datadist.cluster_id))
        return [(each.cluster_id, each.listen_address[1]) for each in self.many]

    def link_many(self, peer: int, port: int) -> list[str]:
        """Each of them links to one peer."""
        return [each.link_clusters([cluster(peer, port)], 20_000)[0].name for each in self.many]

    def num_linked(self) -> int:
        return sum(info.state == "linked" for each in self.many for info in each.links())

    def finish(self) -> None:
        for datadist in getattr(self, "many", ()):
            datadist.finalize()
        super().finish()

    def limit_descriptors(self, further: int) -> None:
        """This process may have only so many more than it has."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, hard))
        # The limit is one of numbers: those below that are free are taken first.
        self.fillers = []
        with contextlib.suppress(OSError):
            while True:
                self.fillers.append(os.eventfd(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(self.fillers) + 1 + further, hard))

    def unlimit_descriptors(self) -> None:
        for descriptor in self.fillers:
            os.close(descriptor)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def try_to_start(self) -> Failure | None:
        """One instance more, and what it says."""
        datadist = LLMDataDist(LLMRole.MIX, 99)
        try:
            datadist.init(make_options(device="cpu"))
        except Exception as error:  # noqa: BLE001 (whatever it is, the test looks at it)
            status = getattr(error, "status_code", None)
            return Failure(type(error).__name__, "" if status is None else status.name, str(error))
        datadist.finalize()
        return None

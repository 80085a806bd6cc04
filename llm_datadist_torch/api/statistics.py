# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDist.stats()``: look at every part of an instance, and at what its transfers counted."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llm_datadist_torch.api.keys import BlocksKey
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.questions import (
    ECHO_QUERY,
    EXAMINE_QUERY,
    STATS_QUERY,
    QuestionHandler,
)
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.observe.stats import (
    CacheStats,
    ErrorStats,
    LinkStats,
    PoolStats,
    QuarantineStats,
    Stats,
)
from llm_datadist_torch.serving.peer import Grant
from llm_datadist_torch.values.enums import Placement

_TIME_BYTES = 8


def look(instance: Instance) -> Stats:
    """Collect all statistics. Does not block; parts are looked at one after the other."""
    listening = instance.links.endpoint.listen_address
    return Stats(
        cluster_id=instance.cluster_id,
        device=str(instance.device.device),
        listen="" if listening is None else f"{listening[0]}:{listening[1]}",
        time=time.time(),
        monotonic_ns=time.monotonic_ns(),
        caches=_caches(instance),
        pools=tuple(_pool_stats(name, pool) for name, pool in _pools(instance).items()),
        links=tuple(_link(LinkInfo.of(link)) for link in instance.links.links()),
        transfers=tuple(instance.transfers.counters()),
        errors=tuple(ErrorStats(*key, n) for key, n in instance.transfers.errors().items()),
        recent=tuple(instance.transfers.recent()),
        quarantine=_quarantine(instance.links.registry.quarantined),
    )


def own_answers(instance: Instance) -> dict[bytes, QuestionHandler]:
    """What answers the requests of the library's own, by name: those of ``top`` and ``doctor``."""

    def examine(peer: int, question: bytes) -> bytes:
        # Loaded by the first instance that is examined; most never are.
        from llm_datadist_torch.api import examination

        return examination.examine(instance, peer, question)

    return {
        STATS_QUERY: lambda *_: look(instance).to_json().encode(),
        EXAMINE_QUERY: examine,
        ECHO_QUERY: _echo,
    }


def _echo(_peer: int, payload: bytes) -> bytes:
    """Answer ECHO_QUERY: the time here, and what was sent."""
    return time.time_ns().to_bytes(_TIME_BYTES, "little") + payload


def read_echo(answer: bytes) -> tuple[int, int]:
    """The time of an answer to ECHO_QUERY (``time.time_ns()`` there), and how much came back."""
    return int.from_bytes(answer[:_TIME_BYTES], "little"), len(answer) - _TIME_BYTES


def _quarantine(grants: Sequence[Grant]) -> QuarantineStats:
    entries = {id(grant.entry): grant.entry for grant in grants}.values()
    return QuarantineStats(len(grants), len(entries), sum(_nbytes(each) for each in entries))


def _nbytes(entry: CacheEntry) -> int:
    layout = entry.layout
    return layout.num_tensors * layout.rows * layout.row_bytes


def _pools(instance: Instance) -> dict[str, ArenaMemory]:
    memories = {each.name.lower(): instance.memory(each) for each in Placement}
    return {n: memory for n, memory in memories.items() if isinstance(memory, ArenaMemory)}


def _pool_stats(name: str, pool: ArenaMemory) -> PoolStats:
    stats = pool.stats
    return PoolStats(name, stats.total_bytes, stats.free_bytes, stats.largest_free_bytes)


def _caches(instance: Instance) -> tuple[CacheStats, ...]:
    found = (instance.catalog.get(cache_id) for cache_id in instance.catalog.ids())
    pools = _pools(instance)
    return tuple(
        _cache(entry, pools, instance.handle(entry.cache_id))
        for entry in found
        if entry is not None
    )


def _names(entry: CacheEntry, handle: Cache | None) -> tuple[str, ...]:
    """Its keys as text; a blocks cache's by the name that the front door was told, if any."""
    name = None if handle is None else handle.name
    return tuple(
        str(key) if name is None or key.kind is not KeyKind.BLOCKS else str(BlocksKey(name))
        for key in list(entry.keys)
    )


def _cache(entry: CacheEntry, pools: dict[str, ArenaMemory], handle: Cache | None) -> CacheStats:
    layout = entry.layout
    of_pool = [(name, pool) for name, pool in pools.items() if entry.region is pool.region]
    name = of_pool[0][0] if of_pool else ""
    spans: tuple[tuple[int, int], ...] = ()
    if of_pool:
        base = of_pool[0][1].base
        addrs: list[int] = entry.addrs.tolist()
        spans = tuple((address - base, layout.extent) for address in addrs)
    return CacheStats(
        cache_id=entry.cache_id,
        names=_names(entry, handle),
        paged=layout.paged,
        tensors=layout.num_tensors,
        rows=layout.rows,
        nbytes=_nbytes(entry),
        device=str(entry.device),
        registered=not entry.owned,
        leases=entry.leases,
        dropped=handle is None,
        pool=name,
        spans=spans,
    )


def _link(info: LinkInfo) -> LinkStats:
    transports = {choice.memory: choice.transport or "" for choice in info.choices}
    return LinkStats(info.peer, info.state, info.since, transports, info.reason)

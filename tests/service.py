# SPDX-License-Identifier: Apache-2.0
"""One instance and its caches, by name: what a test tells another process (or this) to do."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
)
from llm_datadist_torch.transports.local import LocalChannel
from tests.memory.peer import map_pages, unmap

GAP = 48
"""Bytes of canary before, between and after the tensors of a registered cache."""


class Ref(NamedTuple):
    """Stands for the cache of this name in calls to a service."""

    name: str


class Failure(NamedTuple):
    """An exception that came out of an operation, fit for a pipe."""

    kind: str
    status: str
    text: str


class Span(NamedTuple):
    """Where a cache's rows lie in the bytes that ``dump`` returns."""

    starts: tuple[int, ...]
    rows: int
    row_bytes: int
    pitch: int


@dataclass
class Held:
    """A cache and the memory around it."""

    cache: Cache
    address: int
    nbytes: int
    keepalive: Any = None
    span: Span = field(default_factory=lambda: Span((), 0, 0, 0))


class Service:
    """One instance and its caches, by name. Everything that goes in and out can be pickled."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.datadist: LLMDataDist | None = None

    # -- life -------------------------------------------------------------------------------------

    def start(
        self,
        cluster_id: int,
        *,
        remote: bool = False,
        timeout_ms: int = 20_000,
        listen: str | None = "127.0.0.1:0",
        pool: str | None = None,
    ) -> int:
        """Returns the port."""
        config = LLMConfig()
        config.device_id = 0
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = remote
        config.sync_kv_timeout = timeout_ms
        if listen is not None:
            config.listen_ip_info = listen
        if pool is not None:
            config.mem_pool_cfg = pool
        self.datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        self.datadist.init(config.generate_options())
        address = self.datadist.listen_address
        return 0 if address is None else address[1]

    def finish(self) -> None:
        if self.datadist is not None:
            self.datadist.finalize()
        self.held.clear()

    @property
    def dd(self) -> LLMDataDist:
        assert self.datadist is not None
        return self.datadist

    @property
    def manager(self) -> Any:
        return self.dd.cache_manager

    @property
    def instance(self) -> Any:
        return self.dd._instance

    def pid(self) -> int:
        return os.getpid()

    # -- links ------------------------------------------------------------------------------------

    def link(
        self, peer: int, port: int, timeout: int = 10_000, ip: str = "127.0.0.1"
    ) -> tuple[str, list[str]]:
        overall, each = self.dd.link_clusters([cluster(peer, port, ip)], timeout)
        return overall.name, [status.name for status in each]

    def unlink(
        self, peer: int, port: int | None = None, timeout: int = 10_000, *, force: bool = False
    ) -> tuple[str, list[str]]:
        overall, each = self.dd.unlink_clusters([cluster(peer, port)], timeout, force=force)
        return overall.name, [status.name for status in each]

    def link_states(self) -> dict[int, str]:
        return {link.peer: link.state.value for link in self.instance.links.links()}

    # -- caches -----------------------------------------------------------------------------------

    def allocate(
        self,
        name: str,
        count: int,
        rows: int,
        row_bytes: int,
        *,
        paged: bool,
        keys: tuple[CacheKey, ...] | BlocksCacheKey | None = None,
        placement: Placement = Placement.DEVICE,
    ) -> int:
        desc = CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8, placement)
        if paged:
            cache = self.manager.allocate_blocks_cache(desc, keys)
        else:
            cache = self.manager.allocate_cache(desc, keys or ())
        region = self.instance.catalog.find(cache.cache_id).region
        self._hold(name, cache, region.address, region.nbytes)
        return cache.cache_id

    def register(
        self,
        name: str,
        count: int,
        rows: int,
        row_bytes: int,
        *,
        paged: bool,
        keys: tuple[CacheKey, ...] | BlocksCacheKey | None = None,
        pitch: int | None = None,
        ints: bool = False,
        accessible: bool | None = None,
        placement: Placement = Placement.DEVICE,
    ) -> int:
        pitch = pitch or row_bytes
        step = rows * pitch + GAP
        nbytes = GAP + count * step
        starts = [GAP + at * step for at in range(count)]
        given: list[Any]
        if ints:
            nbytes = -(-nbytes // 4096) * 4096
            address = map_pages(nbytes)
            keepalive: Any = None
            given = [address + start for start in starts]
        else:
            keepalive = torch.zeros(nbytes, dtype=torch.uint8)
            address = keepalive.data_ptr()
            given = [keepalive.as_strided((rows, row_bytes), (pitch, 1), start) for start in starts]
        desc = CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8, placement)
        make = self.manager.register_blocks_cache if paged else self.manager.register_cache
        cache = make(desc, given, (None if paged else ()) if keys is None else keys, accessible)
        self._hold(name, cache, address, nbytes, keepalive)
        return cache.cache_id

    def make(self, way: str, name: str, *args: Any, pitch: int | None = None, **kwargs: Any) -> int:
        """A cache of the kind ``allocated``, ``tensors`` or ``ints``."""
        if way == "allocated":
            return self.allocate(name, *args, **kwargs)
        ints = way == "ints"
        return self.register(name, *args, ints=ints, pitch=None if ints else pitch, **kwargs)

    def _hold(
        self, name: str, cache: Cache, address: int, nbytes: int, keepalive: Any = None
    ) -> None:
        layout = cache.layout
        starts = tuple(addr - address for addr in cache.tensor_addrs)
        span = Span(starts, layout.rows, layout.row_bytes, layout.pitch)
        self.held[name] = Held(cache, address, nbytes, keepalive, span)

    def span(self, name: str) -> Span:
        return self.held[name].span

    def cache_id(self, name: str) -> int:
        return self.held[name].cache.cache_id

    def addresses(self, name: str) -> list[int]:
        return self.held[name].cache.tensor_addrs

    def fill(self, name: str, seed: int) -> bytes:
        """Random bytes everywhere, canaries included."""
        held = self.held[name]
        data = random.Random(seed).randbytes(held.nbytes)
        ctypes.memmove(held.address, data, held.nbytes)
        return data

    def paint(self, name: str, value: int) -> None:
        """Every byte of every tensor becomes ``value``."""
        for tensor in self.held[name].cache.tensors:
            tensor.fill_(value)

    def colours(self, name: str) -> list[int]:
        """The distinct bytes of all tensors."""
        found: set[int] = set()
        for tensor in self.held[name].cache.tensors:
            found |= set(tensor.unique().tolist())
        return sorted(found)

    def dump(self, name: str) -> bytes:
        held = self.held[name]
        return ctypes.string_at(held.address, held.nbytes)

    def drop(self, name: str) -> None:
        """End a cache and forget it; foreign memory is unmapped."""
        held = self.held.pop(name)
        cache = held.cache
        if cache.is_registered:
            self.manager.unregister_cache(cache.cache_id)
            if cache.is_foreign:
                unmap(held.address, held.nbytes)
        elif cache.is_blocks_cache:
            self.manager.deallocate_blocks_cache(cache)
        else:
            self.manager.deallocate_cache(cache)

    def pull_the_rug(self, name: str) -> None:
        """Unmap the foreign memory of a cache that is still registered."""
        held = self.held[name]
        unmap(held.address, held.nbytes)

    # -- operations -------------------------------------------------------------------------------

    def run(self, operation: str, *args: Any, **kwargs: Any) -> None:
        """One operation of the cache manager."""
        call = getattr(self.manager, operation)
        call(*map(self._real, args), **{key: self._real(arg) for key, arg in kwargs.items()})

    def attempt(self, operation: str, *args: Any, **kwargs: Any) -> Failure | None:
        """The same, returning what went wrong."""
        try:
            self.run(operation, *args, **kwargs)
        except LLMException as error:
            return Failure(type(error).__name__, error.status_code.name, str(error))
        except (TypeError, ValueError, AttributeError) as error:
            return Failure(type(error).__name__, "", str(error))
        return None

    def hammer(
        self, operation: str, *args: Any, seconds: float = 30.0
    ) -> tuple[int, Failure | None]:
        """Repeat an operation until it fails or the time is up."""
        end = time.monotonic() + seconds
        count = 0
        while time.monotonic() < end:
            failure = self.attempt(operation, *args)
            if failure is not None:
                return count, failure
            count += 1
        return count, None

    def _real(self, arg: Any) -> Any:
        return self.held[arg.name].cache if isinstance(arg, Ref) else arg

    # -- looking inside ---------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        catalog = self.instance.catalog
        return {
            "caches": len(catalog),
            "keys": catalog.num_keys,
            "leases": sum(entry.leases for entry in list(catalog._entries.values())),
            "grants": sum(len(link.grants) for link in self.instance.links.links()),
        }

    def resources(self) -> dict[str, int]:
        """What could leak in this process."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {
            "fds": len(list(Path("/proc/self/fd").iterdir())),
            "maps": len(maps),
            "shared": sum("memfd:" in line for line in maps),
            "threads": len(list(Path("/proc/self/task").iterdir())),
        }

    def pool_stats(self) -> tuple[int, int, int, int]:
        stats = self.instance.memory(Placement.DEVICE)._arena.stats()
        return tuple(stats)

    def arena_in_use(self) -> int:
        return self.pool_stats()[3]

    def only_relay(self, peer: int) -> None:
        """Close every other way of the link."""
        channel = self.instance.links.find(peer).channel
        channel._ways[:] = [way for way in channel._ways if way.name == "relay"]

    def become(self, user: int) -> None:
        """Gives up root: from now on the kernel keeps other users' memory from this process."""
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)

    def note_ways(self) -> None:
        """Record the ways of movements and the warnings from now on, for :meth:`noted`."""
        self._ways: list[str] = []
        self._warnings: list[str] = []
        move = LocalChannel.move

        def noted(channel: LocalChannel, movement: Any, deadline: Any) -> str:
            self._ways.append(move(channel, movement, deadline))
            return self._ways[-1]

        LocalChannel.move = noted  # type: ignore[method-assign]
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("llm_datadist_torch").addHandler(handler)

    def noted(self) -> tuple[list[str], list[str]]:
        return self._ways, self._warnings

    def slow_moves(self, seconds: float) -> None:
        """Every movement that this process carries out takes its time first."""
        move = LocalChannel.move

        def slow(self: LocalChannel, movement: Any, deadline: Any) -> str:
            time.sleep(seconds)
            return move(self, movement, deadline)

        LocalChannel.move = slow  # type: ignore[method-assign]

    def fail(self, text: str) -> None:
        raise RuntimeError(text)

    def leave(self) -> None:
        """End at once, without any clean-up."""
        os._exit(0)

    def hang(self) -> None:
        time.sleep(3600)


def cluster(peer: int, port: int | None, ip: str = "127.0.0.1") -> LLMClusterInfo:
    """The peer at a local port."""
    info = LLMClusterInfo()
    info.remote_cluster_id = peer
    info.append_local_ip_info(ip, 0)
    if port is not None:
        info.append_remote_ip_info(ip, port)
    return info


def settle(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Wait until a condition holds, and return what it returned last."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.005)

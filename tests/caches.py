# SPDX-License-Identifier: Apache-2.0
"""Caches by name, and every byte in and around them, on whatever device they are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMDataDist,
    Placement,
)
from tests.devices import bytes_at, finish_kernels, overwrite, raw
from tests.memory.peer import map_pages, unmap

GAP = 48
"""Bytes of canary before, between and after the tensors of a registered cache."""


def _resize(tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() + 4096)


MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "share_memory": lambda tensor: tensor.share_memory_(),
    "resize": _resize,
    "data": lambda tensor: setattr(tensor, "data", tensor.detach().clone()),
    "set": lambda tensor: tensor.set_(tensor.detach().clone()),
}
"""What replaces the memory of a tensor in place."""


class Ref(NamedTuple):
    """Stands for the cache of this name in calls to a service."""

    name: str


class Span(NamedTuple):
    """Where a cache's rows lie in the bytes that ``dump`` returns."""

    starts: tuple[int, ...]
    rows: int
    row_bytes: int
    row_stride_bytes: int


@dataclass
class Held:
    """A cache and the memory around it."""

    cache: Cache
    address: int
    nbytes: int
    keepalive: Any = None
    span: Span = field(default_factory=lambda: Span((), 0, 0, 0))
    given: list[Any] = field(default_factory=list)

    def memory(self) -> torch.Tensor:
        return bytes_at(self.address, self.nbytes, self.cache.device)


class Caches:
    """The caches of one instance."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.datadist: LLMDataDist | None = None

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

    # -- making them ------------------------------------------------------------------------------

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
        self._keep(name, cache, region.address, region.nbytes)
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
        row_stride_bytes: int | None = None,
        ints: bool = False,
        accessible: bool | None = None,
        placement: Placement = Placement.DEVICE,
    ) -> int:
        row_stride_bytes = row_stride_bytes or row_bytes
        step = rows * row_stride_bytes + GAP
        address, nbytes, keepalive = self._take(GAP + count * step, placement, unowned=ints)
        starts = [GAP + at * step for at in range(count)]
        given: list[Any] = [address + start for start in starts]
        if not ints:
            given = [
                keepalive.as_strided((rows, row_bytes), (row_stride_bytes, 1), start)
                for start in starts
            ]
        desc = CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8, placement)
        make = self.manager.register_blocks_cache if paged else self.manager.register_cache
        cache = make(desc, given, (None if paged else ()) if keys is None else keys, accessible)
        self._keep(name, cache, address, nbytes, keepalive)
        self.held[name].given = given
        return cache.cache_id

    def register_part(
        self, outer: str, name: str, start: int, stop: int, key: BlocksCacheKey
    ) -> None:
        """Blocks of a registered cache once more, as a cache of their own."""
        whole = self.held[outer]
        part = [tensor[start:stop] for tensor in whole.given]
        desc = CacheDesc(len(part), part[0].shape, DataType.DT_UINT8)
        cache = self.manager.register_blocks_cache(desc, part, key)
        self._keep(name, cache, whole.address, whole.nbytes, whole.keepalive)
        self.held[name].given = part

    def _take(
        self, nbytes: int, placement: Placement, *, unowned: bool
    ) -> tuple[int, int, torch.Tensor | None]:
        """Address, size and owner of memory; foreign host memory is nothing torch knows of."""
        device = self.instance.device_of(placement)
        if unowned and device.type == "cpu":
            nbytes = -(-nbytes // 4096) * 4096
            return map_pages(nbytes), nbytes, None
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        finish_kernels()
        return memory.data_ptr(), nbytes, memory

    def make(
        self, way: str, name: str, *args: Any, row_stride_bytes: int | None = None, **kwargs: Any
    ) -> int:
        """A cache of the kind ``allocated``, ``tensors`` or ``ints``."""
        if way == "allocated":
            return self.allocate(name, *args, **kwargs)
        ints = way == "ints"
        return self.register(
            name, *args, ints=ints, row_stride_bytes=None if ints else row_stride_bytes, **kwargs
        )

    def _keep(
        self, name: str, cache: Cache, address: int, nbytes: int, keepalive: Any = None
    ) -> None:
        layout = cache.layout
        starts = tuple(addr - address for addr in cache.tensor_addrs)
        span = Span(starts, layout.rows, layout.row_bytes, layout.row_stride_bytes)
        self.held[name] = Held(cache, address, nbytes, keepalive, span)

    def drop(self, name: str) -> None:
        """End a cache and forget it; foreign memory is unmapped."""
        held = self.held.pop(name)
        cache = held.cache
        if cache.is_registered:
            self.manager.unregister_cache(cache.cache_id)
            if held.keepalive is None:
                unmap(held.address, held.nbytes)
        elif cache.is_blocks_cache:
            self.manager.deallocate_blocks_cache(cache)
        else:
            self.manager.deallocate_cache(cache)

    def pull_the_rug(self, name: str) -> None:
        """Unmap the foreign memory of a cache that is still registered."""
        held = self.held[name]
        unmap(held.address, held.nbytes)

    def move_tensor(self, name: str, how: str, index: int) -> None:
        """Replace the memory of one tensor, the caller's own where it brought one."""
        tensor = self._users(name)[index]
        if how == "send":
            # The bytes of it can be unpickled once, by another process.
            self._sent = ForkingPickler.dumps(tensor)
        else:
            MOVES[how](tensor)

    def _users(self, name: str) -> list[torch.Tensor]:
        """The tensors that the user of a cache has in hand."""
        held = self.held[name]
        return list(held.given or held.cache.tensors)

    def paint_tensor(self, name: str, index: int, value: int) -> None:
        self._users(name)[index].fill_(value)

    def users_rows(self, name: str) -> list[list[int]]:
        """The byte that each row is full of, per tensor."""
        tensors = self._users(name)
        assert all(bool((tensor == tensor[:, :1]).all()) for tensor in tensors), "a row is torn"
        return [tensor[:, 0].tolist() for tensor in tensors]

    def churn(self, keys: int, rounds: int) -> None:
        """One piece of memory, registered again and again, each time painted with its key."""
        device = self.instance.device_of(Placement.DEVICE)
        memory = torch.zeros(16, 1 << 16, dtype=torch.uint8, device=device)
        desc = CacheDesc(1, memory.shape, DataType.DT_UINT8)
        for count in range(rounds):
            memory.fill_(count % keys)
            finish_kernels()
            key = BlocksCacheKey(self.dd.cluster_id, count % keys)
            cache = self.manager.register_blocks_cache(desc, [memory], key)
            time.sleep(0.002)
            self.manager.unregister_cache(cache.cache_id)

    # -- what they are and hold -------------------------------------------------------------------

    def span(self, name: str) -> Span:
        return self.held[name].span

    def cache_id(self, name: str) -> int:
        return self.held[name].cache.cache_id

    def addresses(self, name: str) -> list[int]:
        return self.held[name].cache.tensor_addrs

    def device(self, name: str) -> str:
        return str(self.held[name].cache.device)

    def fill(self, name: str, seed: int) -> bytes:
        """Random bytes everywhere, canaries included, there when this returns."""
        held = self.held[name]
        data = random.Random(seed).randbytes(held.nbytes)
        overwrite(held.memory(), data)
        return data

    def dump(self, name: str) -> bytes:
        return raw(self.held[name].memory())

    def paint(self, name: str, value: int) -> None:
        """Every byte of every tensor becomes ``value``, when this returns."""
        for tensor in self.held[name].cache.tensors:
            tensor.fill_(value)
        finish_kernels()

    def colours(self, name: str) -> list[int]:
        """The distinct bytes of all tensors."""
        found: set[int] = set()
        for tensor in self.held[name].cache.tensors:
            found |= set(tensor.cpu().unique().tolist())
        return sorted(found)

    def all_are(self, name: str, value: int) -> bool:
        """Whether every element is this; for caches too large for ``colours``."""
        tensors = self.held[name].cache.tensors
        return all(bool((tensor == value).all()) for tensor in tensors)

    def rows(self, name: str) -> list[list[int]]:
        """The first byte of each row, per tensor."""
        return [tensor.cpu()[:, 0].tolist() for tensor in self.held[name].cache.tensors]

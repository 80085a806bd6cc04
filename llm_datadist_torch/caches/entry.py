# SPDX-License-Identifier: Apache-2.0
"""One cache as the catalog knows it, and the names that lead to it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.guard import make_guard
from llm_datadist_torch.caches.versions import Generation
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey
from llm_datadist_torch.values.layout import Layout


class KeyKind(str, Enum):
    """The three name spaces of keys.

    They never meet, so a blocks key can't hide a request (section 14, 16).
    """

    REQUEST = "request"
    PREFIX = "prefix"
    BLOCKS = "blocks"


class KeyName(NamedTuple):
    """A key as the catalog and the messages know it.

    Without the cluster id, which only says where to look.
    """

    kind: KeyKind
    value: int
    model_id: int

    def __str__(self) -> str:
        """The key in the words of its public class."""
        if self.kind is KeyKind.BLOCKS:
            return f"BlocksCacheKey(model_id={self.model_id})"
        name = "req_id" if self.kind is KeyKind.REQUEST else "prefix_id"
        return f"CacheKey({name}={self.value}, model_id={self.model_id})"


def name_of(key: CacheKey | BlocksCacheKey) -> KeyName:
    """The catalog's name for a public key; a prefix wins over a request id (reference API, 8.5)."""
    if isinstance(key, BlocksCacheKey):
        return KeyName(KeyKind.BLOCKS, 0, key.model_id)
    if key.is_prefix:
        return KeyName(KeyKind.PREFIX, key.prefix_id, key.model_id)
    return KeyName(KeyKind.REQUEST, key.req_id, key.model_id)


@dataclass(eq=False)
class CacheEntry:
    """One cache of this instance.

    Attributes:
        cache_id: Its id, unique in this instance.
        layout: Where its rows lie.
        tensors: Its memory; the entry is what keeps it alive for peers.
        addrs: Addresses of the tensors, int64 [num_tensors].
        owned: Allocated by us; False for registered memory.
        remote_accessible: Whether peers may read and write it.
        region: The region that all its tensors lie in, or None for memory that isn't ours.
        owns_region: The region is this cache's alone, and ends with it (else it is a pool's).
        unowned: Registered as bare addresses: nothing keeps that memory alive.
        keys: Key -> row.
        held: Whether the user still holds the id.
        covered: Per key, the tensors that partial pulls have already fetched.
        rows_first: Whether dimension 0 of its tensors is the rows; else it can't be transferred.
        generation: Tells peers when what they know of it is out of date; the catalog gives it.
        flag: Raised by a storage that drops the cache's memory; None where torch doesn't report
            that, so that the owner must be asked.
        ending: Held by the thread that frees it.
        owner: Keeps the memory of the cache, also when its tensors have other memory.
        guard: Counts its leases. Every use of the cache is under one:
            ``with entry.guard.acquire(entry):``. Taking it is one C call, which raises
            LLMCacheNotFoundError where a tensor is not where ``addrs`` says any more. By default
            it watches no tensors.
    """

    cache_id: int
    layout: Layout
    tensors: tuple[torch.Tensor, ...]
    addrs: torch.Tensor
    owned: bool
    remote_accessible: bool
    region: Region | None = None
    owns_region: bool = False
    unowned: bool = False
    keys: dict[KeyName, int] = field(default_factory=dict)
    held: bool = True
    covered: dict[KeyName, set[int]] = field(default_factory=dict)
    rows_first: bool = True
    generation: Generation | None = None
    flag: _C.MoveFlag | None = None
    ending: threading.Lock = field(default_factory=threading.Lock)
    owner: object = None
    guard: _C.CacheGuard = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """A guard that watches nothing, unless there is one."""
        if self.guard is None:
            self.guard = make_guard(
                f"cache {self.cache_id}", self.addrs, self.layout.extent, cache_id=self.cache_id
            )

    @property
    def leases(self) -> int:
        """Uses of its memory that are under way: transfers and copies."""
        return self.guard.leases

    def drop_memory(self) -> None:
        """Drop the tensors; if nothing else refers to them, the memory is free."""
        self.tensors = ()
        self.guard.forget()
        self.owner = None

    def publish(self, generation: Generation) -> None:
        """Peers may learn of it from now on, and see by these counters what has changed."""
        self.generation = generation
        if self.flag is not None:
            self.flag.arm(generation.region.address + generation.offset)

    @property
    def binding(self) -> int:
        """Changes with its keys and with its end; 0 outside a catalog."""
        return 0 if self.generation is None else self.generation.binding

    def rebound(self) -> None:
        """What peers know of it is out of date."""
        if self.generation is not None:
            self.generation.rebound()

    def freed(self) -> None:
        """Its memory may be another cache's from now on."""
        if self.flag is not None:
            self.flag.disarm()
        if self.generation is not None:
            self.generation.freed()

    @property
    def device(self) -> torch.device:
        """Where its memory is; all tensors of a cache are on one device."""
        return self.tensors[0].device

    @property
    def reachable(self) -> bool:
        """Whether somebody may still start to use it.

        A lease alone only finishes what is under way.
        """
        return self.held or bool(self.keys)


class Resolved(NamedTuple):
    """What a key leads to.

    A cache, a row of it, the request key that a pull of it consumes, and the cache's binding at
    that moment.
    """

    entry: CacheEntry
    row: int
    consumes: KeyName | None
    binding: int

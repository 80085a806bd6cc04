# SPDX-License-Identifier: Apache-2.0
"""What one instance owns: its caches, their keys, and who still refers to them. No I/O, no devices.

An owned cache lives while its id is held, or a key names it, or a lease is on it (reference API,
8.5). A registered cache lives until it is unregistered, which waits for its leases.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from llm_datadist_torch.caches.address_index import AddressIndex
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind, KeyName, Resolved, name_of
from llm_datadist_torch.caches.versions import Generations
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    from llm_datadist_torch import _C


class Catalog:
    """Caches and keys of one instance.

    Thread safety: every method may be called from any thread; one lock guards all tables.
    ``on_free`` is called without the lock. Leases are counted by each entry's guard, in C++.

    Args:
        on_free: Called with each entry that has just left the catalog, after its last lease, and
            with the deadline of whoever ended it, if there is one.
    """

    def __init__(
        self, on_free: Callable[[CacheEntry, Deadline | None], None] = lambda *_: None
    ) -> None:
        # Not a Condition: taking that one runs Python code, in which Ctrl-C would lose the lock.
        self._lock = threading.RLock()
        self._entries: dict[int, CacheEntry] = {}
        self._clearing: list[CacheEntry] = []
        self._keys: dict[KeyName, CacheEntry] = {}
        self._by_address: AddressIndex[CacheEntry] = AddressIndex()
        self._ids = itertools.count(1)
        self._generations = Generations()
        self._on_free = on_free
        # Nobody may start to use them any more; they go with their last lease.
        self._ended: dict[int, CacheEntry] = {}
        self._on_idle = functools.partial(_sweep, weakref.ref(self))

    def next_id(self) -> int:
        """A fresh cache id; ids start at 1 and are never used again (reference API, 8.2)."""
        return next(self._ids)

    def __len__(self) -> int:
        """Number of caches, including those that only a key or a lease keeps."""
        return len(self._entries)

    def ids(self) -> list[int]:
        """Ids of all these caches, oldest first."""
        with self._lock:
            return list(self._entries)

    def for_each_in_use(self, visit: Callable[[CacheEntry], None]) -> None:
        """Call ``visit`` with each entry that has its memory, those that have ended included."""
        with self._lock:
            entries = {**self._entries, **self._ended}.values()
        for entry in entries:
            with entry.ending:  # or another thread frees it meanwhile
                if entry.tensors:
                    visit(entry)

    @property
    def num_keys(self) -> int:
        """Keys that are bound to a cache."""
        return len(self._keys)

    # -- creation ---------------------------------------------------------------------------------

    def add(self, entry: CacheEntry, keys: Sequence[CacheKey | BlocksCacheKey]) -> None:
        """Add a cache and bind its keys.

        Position in ``keys`` = row, placeholders are skipped. All or nothing.

        Raises:
            LLMParamError: More keys than rows, a key given twice, a key that is bound already.
            LLMOutOfMemoryError: No memory for the cache's counters.
        """
        layout = entry.layout
        if not layout.paged and len(keys) > layout.rows:
            raise param_error(f"{len(keys)} cache_keys for a cache of {layout.rows} rows")
        named: dict[KeyName, int] = {}
        for row, key in enumerate(keys):
            if isinstance(key, CacheKey) and key.is_placeholder:
                continue
            name = name_of(key)
            if name in named:
                raise param_error(f"cache_keys[{row}] repeats cache_keys[{named[name]}]: {name}")
            named[name] = row
        self.sweep()
        with self._lock:
            for name in named:
                if name in self._keys:
                    bound = self._keys[name]
                    raise param_error(
                        f"{name} is bound to cache {bound.cache_id} already",
                        remedy=_how_to_unbind(bound),
                    )
            entry.publish(self._generations.take())
            entry.keys = named
            self._entries[entry.cache_id] = entry
            self._by_address.add(entry, entry.addrs.tolist(), layout.extent)
            self._keys.update(dict.fromkeys(named, entry))

    # -- lookup -----------------------------------------------------------------------------------

    def get(self, cache_id: int) -> CacheEntry | None:
        """The entry of ``cache_id``, or None if there is none that somebody may still use."""
        entry = self._entries.get(cache_id)
        return entry if entry is not None and entry.reachable else None

    def find(self, cache_id: int) -> CacheEntry:
        """The entry of ``cache_id``.

        Raises:
            LLMCacheNotFoundError: No such cache.
        """
        entry = self._entries.get(cache_id)
        if entry is None or not (entry.held or entry.keys):
            raise _not_found(
                f"cache {cache_id} does not exist (never created, deallocated or unregistered)"
            )
        return entry

    def resolve_key(self, name: KeyName) -> Resolved:
        """The cache and row of a key.

        Raises:
            LLMCacheNotFoundError: No cache has this key (any more).
        """
        with self._lock:
            entry = self._keys.get(name)
            if entry is None:
                raise _not_found(
                    f"no cache has {name} (never bound, removed, or consumed by a pull)"
                )
            consumes = name if name.kind is KeyKind.REQUEST else None
            return Resolved(entry, entry.keys[name], consumes, entry.binding)

    def resolve_id(self, cache_id: int, row: int) -> Resolved:
        """The cache of an id, and the request key of ``row`` if it has one.

        Pulling the row consumes that too.

        Raises:
            LLMCacheNotFoundError: No such cache, or no such row in it.
        """
        with self._lock:
            entry = self.find(cache_id)
            if not entry.layout.paged and not 0 <= row < entry.layout.rows:
                raise _not_found(
                    f"batch_index={row} is out of range [0, {entry.layout.rows}) of cache"
                    f" {cache_id}"
                )
            named = (n for n, r in entry.keys.items() if r == row and n.kind is KeyKind.REQUEST)
            return Resolved(entry, row, next(named, None), entry.binding)

    def resolve_address(self, address: int) -> Resolved:
        """The cache one of whose tensors contains ``address``, int64 as in ``CacheEntry.addrs``.

        Where several do, one that peers may use, if there is one.

        Raises:
            LLMParamError: None does.
        """
        with self._lock:
            inside = [
                entry
                for entry in self._by_address.near(address)
                if entry.reachable and entry.layout.tensor_at(entry.addrs, address) is not None
            ]
            if inside:
                best = max(inside, key=lambda entry: entry.remote_accessible)
                return Resolved(best, 0, None, best.binding)
        raise param_error(
            f"no cache contains the address {address:#x}",
            remedy="only memory that is allocated or registered as a cache can be written to.",
        )

    # -- the ends of a cache ----------------------------------------------------------------------

    def release_id(self, cache_id: int) -> bool:
        """Drop the user's reference to an allocated cache.

        Keys and leases may keep it. Unknown ids are ignored (reference API, 8.5).

        A blocks cache loses its key at once.

        Returns:
            Whether the id named an owned cache that was still held.
        """
        with self._lock:
            entry = self._entries.get(cache_id)
            if entry is None or not entry.owned or not entry.held:
                return False
            entry.rebound()
            if entry.layout.paged:
                self._drop_keys(entry, list(entry.keys))
            entry.held = False
            freed = self._collect(entry)
        self._notify(freed)
        return True

    def remove_key(self, name: KeyName) -> None:
        """Unbind a key of an owned cache.

        Unknown keys, and keys of registered caches, are left as they are.
        """
        with self._lock:
            entry = self._keys.get(name)
            if entry is None or not entry.owned:
                return
            self._drop_keys(entry, [name])
            freed = self._collect(entry)
        self._notify(freed)

    def consume(self, entry: CacheEntry, name: KeyName, tensors: Iterable[int]) -> None:
        """Note that a pull by ``name`` has fetched ``tensors``.

        The key goes when all tensors have been fetched.

        Counted per key (section 14, 15). Registered caches keep their keys (reference API, 8.3).
        """
        with self._lock:
            if not entry.owned or name not in entry.keys:
                return
            covered = entry.covered.setdefault(name, set())
            covered.update(tensors)
            if len(covered) < entry.layout.num_tensors:
                return
            self._drop_keys(entry, [name])
            freed = self._collect(entry)
        self._notify(freed)

    def end_orphan(self, entry: CacheEntry, name: KeyName, *, drop: bool) -> None:
        """Who had begun to pull by ``name`` is gone: drop the key, or offer all of it again."""
        with self._lock:
            if not entry.owned or name not in entry.keys:
                return
            if drop:
                self._drop_keys(entry, [name])
            else:
                entry.covered.pop(name, None)
            freed = self._collect(entry)
        self._notify(freed)

    def unregister(self, cache_id: int, deadline: Deadline) -> None:
        """Forget a registered cache, after waiting for its leases.

        Then its memory is the caller's alone again. No new leases are given while it waits.

        Raises:
            LLMTimeoutError: A transfer still uses it at the deadline; the cache stays registered.
        """
        entry = self._entries.get(cache_id)
        if entry is None:
            return
        # Without the lock; gives no new leases meanwhile.
        left = entry.guard.drain(deadline.at_ns)
        if left:
            raise error_for(
                LLMStatusCode.LLM_TIMEOUT,
                f"cache {cache_id} is still used by {left} transfer(s) after"
                f" {deadline.budget_ms} ms",
                op="unregister_cache",
                cache_id=cache_id,
                remedy="wait for the transfers, or unlink the peers, and call again.",
            )
        with self._lock:
            self._drop_keys(entry, list(entry.keys))
            entry.held = False
            freed = self._collect(entry)
        self._notify(freed, deadline)

    def clear(self) -> None:
        """Forget everything: the instance has ended. Running transfers keep what they use."""
        with self._lock:
            self._clearing += self._entries.values()
            self._entries.clear()
            self._ended.clear()
            self._keys.clear()
            self._by_address.clear()
            # The old counters go with the last entry that has some.
            self._generations = Generations()
        # If this is interrupted, the next call goes on with it.
        while self._clearing:
            entry = self._clearing[-1]
            entry.freed()
            entry.held = False
            entry.keys = {}
            if not entry.guard.end(_nothing):
                entry.drop_memory()
            self._clearing.pop()

    # -- leases -----------------------------------------------------------------------------------

    def acquire(self, entry: CacheEntry) -> _C.Lease[CacheEntry]:
        """A lease: keeps an entry's memory in place until it is given back or dropped.

        Raises:
            LLMCacheNotFoundError: The entry has left the catalog meanwhile, is being unregistered,
                or one of its tensors has moved.
        """
        return entry.guard.acquire(entry)

    def share(self, entry: CacheEntry) -> _C.Lease[CacheEntry]:
        """One more lease, for a caller that knows of one: the entry is there, if not for others.

        Raises:
            LLMCacheNotFoundError: One of its tensors has moved, or there is no lease.
        """
        return entry.guard.share(entry)

    def sweep(self) -> None:
        """Free the caches that have ended and are not leased any more.

        Called after the last lease of such a cache, and before a new one comes. Where Ctrl-C ended
        the call that was to free a cache, the next sweep does its work.
        """
        if not self._ended:
            return
        with self._lock:
            ended = [entry for entry in self._ended.values() if not entry.ending.locked()]
            freed = [self._collect(entry) for entry in ended]
        for entry in freed:
            self._notify(entry)

    # -- helpers, called with the lock held -------------------------------------------------------

    def _drop_keys(self, entry: CacheEntry, names: Sequence[KeyName]) -> None:
        entry.rebound()
        for name in names:
            if self._keys.get(name) is entry:
                del self._keys[name]
            entry.keys.pop(name, None)
            entry.covered.pop(name, None)

    def _collect(self, entry: CacheEntry) -> CacheEntry | None:
        if entry.reachable:
            return None
        # Listed until all has been done: each step may be interrupted, and can be done again.
        self._ended[entry.cache_id] = entry
        if entry.guard.end(self._on_idle):
            return None
        self._by_address.remove(entry, entry.addrs.tolist(), entry.layout.extent)
        # Before anybody else can get the memory.
        entry.freed()
        self._entries.pop(entry.cache_id, None)
        return entry

    def _notify(self, freed: CacheEntry | None, deadline: Deadline | None = None) -> None:
        if freed is None:
            return
        with freed.ending:
            if self._ended.get(freed.cache_id) is not freed:
                return
            try:
                # Not once more if only the rest is left.
                if freed.tensors:
                    self._on_free(freed, deadline)
            except LLMException:
                self._drop(freed)
                raise
            self._drop(freed)

    def _drop(self, freed: CacheEntry) -> None:
        freed.drop_memory()
        # In one step, so that no counters are ever given to two caches.
        generation = vars(freed).pop("generation", None)
        if generation is not None:
            self._generations.give_back(generation)
        self._ended.pop(freed.cache_id, None)


def _how_to_unbind(entry: CacheEntry) -> str:
    if not entry.owned:
        return f"unregister_cache({entry.cache_id}) first, or use another key."
    if entry.layout.paged:
        return f"deallocate_blocks_cache() of cache {entry.cache_id} first, or use another key."
    return "remove_cache_key() first, or use another key."


def _sweep(catalog: weakref.ref[Catalog]) -> None:
    """What a guard calls; it must not keep the catalog alive."""
    found = catalog()
    if found is not None:
        found.sweep()


def _nothing() -> None:
    """Do nothing after the last lease: references to the entry keep its memory."""


def _not_found(message: str) -> LLMException:
    return error_for(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, message)

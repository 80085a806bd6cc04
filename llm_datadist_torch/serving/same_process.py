# SPDX-License-Identifier: Apache-2.0
"""Peers in this process: how they are known, and what may be done in their memory.

What a peer says of itself proves nothing: a stranger can repeat it. So each end of a link enters a
table of this process, and a peer is in this process if it is found there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.serving.leased_memory import check_inside
from llm_datadist_torch.transports.base import Direction, Movement
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    from llm_datadist_torch import _C
    from llm_datadist_torch.serving.peer import ServedPeer

_lock = threading.Lock()
_present: weakref.WeakValueDictionary[tuple[str, str], LinkEnd] = weakref.WeakValueDictionary()


class LinkEnd:
    """One end of a link that is in this process, for the other end to find.

    In the table as long as somebody refers to it: a dial, then its link.

    Args:
        name: Random name of the link.
        epoch: The life of the instance at this end.
        catalog: What that instance owns.
    """

    def __init__(self, name: str, epoch: str, catalog: Catalog) -> None:
        self.catalog = catalog
        self._link: weakref.ref[ServedPeer] | None = None
        with _lock:
            _present[name, epoch] = self

    def open(self, link: ServedPeer) -> None:
        """The link has been made."""
        self._link = weakref.ref(link)

    @property
    def link(self) -> ServedPeer | None:
        """The link at this end; None before it has been made and after it has ended."""
        return None if self._link is None else self._link()


class SameProcessPeer:
    """A peer that is in this process; a ``SameProcessPeer`` of the transports.

    Messages are not trusted, because a process that relays them could change them. Only memory that
    the peer's instance itself has leased on this link, or lets all its peers read, is touched.

    Args:
        there: The peer's end of the link.
        epoch: The life of the instance at our end.
    """

    def __init__(self, there: LinkEnd, epoch: str) -> None:
        self._there = there
        self._epoch = epoch

    @classmethod
    def find(cls, name: str, there: str, here: str) -> SameProcessPeer | None:
        """The other end of a link.

        Args:
            name: The link's name.
            there: The life that the peer says it has.
            here: Our own; nobody else can have it.
        """
        with _lock:
            found = None if there == here else _present.get((name, there))
        return None if found is None else cls(found, here)

    @contextmanager
    def using(self, movement: Movement) -> Iterator[bool]:
        """See ``transports.base.SameProcessPeer``."""
        with self._acquire(movement) as entry:
            _check(movement, entry)
            yield entry.unowned

    def _acquire(self, movement: Movement) -> _C.Lease[CacheEntry]:
        """One more lease on the cache that the movement is about."""
        link, catalog = self._there.link, self._there.catalog
        if link is None or link.epoch != self._epoch:
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "the peer's end of the link has ended")
        write = movement.direction is Direction.WRITE
        if movement.lease_id == 0:
            entry = catalog.find(movement.cache_id)
            if write or not entry.remote_accessible:
                raise param_error(f"the peer's cache {entry.cache_id} is not remote accessible")
            return catalog.acquire(entry)
        grant = link.grants.get(movement.lease_id)
        if grant is None:
            raise _no_lease(movement)
        if write and not grant.write:
            raise param_error(f"lease {movement.lease_id} is for reading")
        lease = catalog.share(grant.entry)
        # It was the peer's lease that kept the cache until now.
        if link.grants.get(movement.lease_id) is not grant:
            lease.release()
            raise _no_lease(movement)
        return lease


def _no_lease(movement: Movement) -> LLMException:
    return error_for(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, f"there is no lease {movement.lease_id}")


def _check(movement: Movement, entry: CacheEntry) -> None:
    """Raise unless a movement stays inside the rows of its cache."""
    layout = entry.layout
    if layout.row_stride_bytes != layout.row_bytes:
        _, remote, sizes = movement.expanded()
        check_inside(remote, sizes, entry, limit=None)
        inside = True
    else:
        inside = set(movement.remote_addrs.tolist()) <= set(entry.addrs.tolist())
        inside = inside and movement.remote_extent <= layout.extent
    if not inside or movement.remote_device != str(entry.device):
        raise param_error(f"the movement leaves the peer's cache {entry.cache_id}")

# SPDX-License-Identifier: Apache-2.0
"""Transfers between a cache of ours and one of a peer: what all pulls and pushes have in common.

Each operation is a class: its constructor checks the arguments, ``check_local`` what depends on the
local cache, ``plan`` says which bytes move. This file resolves the key at the peer, moves the bytes
and releases the peer's cache (reference API, 9.3, 9.4).
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch.autograd.profiler import record_function

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.links.held_leases import LeaseTicket
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.link import Link
from llm_datadist_torch.links.work import CacheTask, Work
from llm_datadist_torch.memory import streams
from llm_datadist_torch.memory.streams import Stream, StreamPoint
from llm_datadist_torch.movement import background
from llm_datadist_torch.movement.remote import BLOCKS, Key, RemoteCache, query_of
from llm_datadist_torch.serving.messages import CacheView, Claim, Resolve
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.transports.base import Direction, Movement, StaleCacheError
from llm_datadist_torch.values.checks import check_timeout_ms, param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.layout import Layout
from llm_datadist_torch.values.status import (
    LLMException,
    LLMStatusCode,
    LLMTimeoutError,
    error_for,
)

_profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]  # noqa: SLF001
_BUSY_PAUSE_S = 0.001


class Plan(NamedTuple):
    """What a transfer moves, once both caches are known.

    Attributes:
        local: Local tensors, by index.
        remote: Their partners.
        runs: int64 [n, 3], columns (local offset, remote offset, nbytes).
    """

    local: range
    remote: range
    runs: torch.Tensor


Plans: TypeAlias = Iterable[Plan]


class Transfer(ABC):
    """One pull or push. Its constructor has checked the arguments as far as they alone allow it.

    Args:
        instance: Whose call it is.
        key: Names the peer and its cache.
        cache: The local cache.
        paged: The kind of cache wanted at the peer; None for either.
    """

    direction: ClassVar[Direction]
    operation: ClassVar[str]
    """Its public name, for statistics."""

    def __init__(self, instance: Instance, key: Key, cache: Cache, paged: bool | None) -> None:
        self._instance = instance
        self._peer = key.cluster_id
        self._cache = cache
        write = self.direction is Direction.WRITE
        if isinstance(key, BlocksCacheKey):
            self._query = Resolve(BLOCKS, 0, key.model_id, paged, write)
        else:
            self._query = query_of(key, paged=paged, write=write)

    @abstractmethod
    def check_local(self, local: Layout) -> None:
        """Check what depends on the local cache, before anything is sent.

        Raises:
            LLMParamError: Something does not fit.
        """

    @abstractmethod
    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """Which bytes move.

        Raises:
            LLMParamError: The caches do not fit each other.
        """

    @abstractmethod
    def _transfer(self, link: Link, entry: CacheEntry, deadline: Deadline) -> None:
        """Resolve, move, release."""

    # -- the two forms of a call ------------------------------------------------------------------

    def run(self, wait_stream: Stream | None = None, timeout: int | None = None) -> None:
        """Carry it out; blocks until the data has landed.

        At most for ``timeout``, or ``sync_kv_timeout``. A lost link is relinked first. No byte
        moves before what is on ``wait_stream`` now is done (see :func:`streams.point`).

        Raises:
            TypeError: ``wait_stream`` is not a stream.
            LLMParamError: The peer is this instance, or something does not fit.
            LLMCacheNotFoundError: The local or the peer's cache does not exist.
            LLMNotLinkedError: No link, or it was lost meanwhile.
            LLMTimeoutError: Not done in time; nothing is written any more, the link stays usable.
        """
        if timeout is not None:
            timeout = check_timeout_ms(timeout)
        if self._peer == self._instance.cluster_id:
            self.check_peer()
        point = None
        if wait_stream is not None or torch.accelerator.current_accelerator() is not None:
            point = streams.point(wait_stream, self._cache.device)
        with self._instance.using(self._cache) as entry:
            self.run_leased(entry, point, timeout)

    def start(self, wait_stream: Stream | None = None, timeout: int | None = None) -> CacheTask:
        """Carry it out in the background. Holds a lease on the local cache until the task is done.

        Raises:
            TypeError: ``wait_stream`` is not a stream.
            TypeError, ValueError, LLMParamError: ``timeout`` is not a time.
        """
        timeout_ms = None if timeout is None else check_timeout_ms(timeout)
        point = streams.point(wait_stream, self._cache.device)

        def job(work: Work, entry: CacheEntry) -> None:
            with work.step(0):
                if background.attempt(work, 0, lambda: self.run_leased(entry, point, timeout_ms)):
                    work.succeed(0)
                    work.layers_done = 1

        return background.start(
            self._instance, self._instance.transfer_workers, self._cache, job, check=self.check_peer
        )

    def check_peer(self) -> None:
        """Check that the transfer is with somebody else.

        Raises:
            LLMParamError: The peer is this instance.
        """
        if self._peer == self._instance.cluster_id:
            raise param_error(
                f"cluster {self._peer} is this instance itself",
                remedy="use copy_blocks or copy_cache.",
            )

    def run_leased(
        self, entry: CacheEntry, point: StreamPoint | None = None, timeout_ms: int | None = None
    ) -> None:
        """As :meth:`run`, for a caller that holds a lease on the local cache.

        ``point``: What must be done before a byte moves.
        """
        instance = self._instance
        if not entry.rows_first:
            raise param_error(
                f"batch_dim_index={self._cache.cache_desc.batch_dim}: only 0 can be copied or"
                " transferred"
            )
        self.check_local(entry.layout)
        if instance.config.remote_accessible and not entry.remote_accessible:
            raise param_error(
                f"cache {entry.cache_id} is not remote accessible",
                remedy="register it with remote_accessible=True.",
            )
        deadline = instance.deadline(timeout_ms)
        try:
            link = instance.links.registry.by_peer.get(self._peer)
            if link is None or link.state is not LinkState.LINKED:
                link = instance.links.use(self._peer, deadline)
            if point is not None:
                point.wait(deadline)
            transfers = link.transfers
            while True:
                ticket = threading.Lock()
                with ticket:
                    transfers.running.add(ticket)
                    if not (transfers.stopping and transfers.stopped):
                        try:
                            if _profiler_enabled():
                                with record_function(f"llm_datadist_torch::{self.operation}"):
                                    self._transfer(link, entry, deadline)
                            else:
                                self._transfer(link, entry, deadline)
                        finally:
                            transfers.running.discard(ticket)
                        return
                if not transfers.wait_until_allowed(deadline):
                    raise error_for(
                        LLMStatusCode.LLM_TIMEOUT,
                        f"unlinking cluster {self._peer} took all of {deadline.budget_ms} ms",
                        peer=self._peer,
                    )
        except LLMException as error:
            instance.transfers.failed(self.operation, self._peer, error.status_code.name)
            raise

    # -- moving -----------------------------------------------------------------------------------

    def _move(
        self,
        link: Link,
        entry: CacheEntry,
        remote: RemoteCache,
        deadline: Deadline,
        claim: Claim | None = None,
    ) -> tuple[int, int] | None:
        """Move all bytes.

        Returns:
            The peer's tensors [start, stop) that have been dealt with; None for none.

        Raises:
            StaleCacheError: By a claim: what was read is not the peer's cache any more.
            LLMCacheNotFoundError: The same under a lease.
        """
        view, addrs = remote.view, entry.addrs
        # Memory of the peer's user moves without changing the version: then only the owner knows.
        version = None if claim is not None and view.owner_validates else view.version
        first = last = path = None
        nbytes = 0
        try:
            for local, partners, runs in self.plan(entry.layout, remote):
                first, last = partners.start if first is None else first, partners.stop
                if not runs.numel():
                    continue
                movement = Movement(
                    self.direction,
                    addrs if len(local) == len(addrs) else addrs[local.start : local.stop],
                    remote.addrs
                    if len(partners) == len(remote.addrs)
                    else remote.addrs[partners.start : partners.stop],
                    runs,
                    view.region,
                    0 if claim is not None else view.lease_id,
                    entry.unowned,
                    view.unowned,
                    entry.tensors[0].device,
                    view.device,
                    view.cache_id,
                    version,
                    claim,
                )
                path = remote.move(movement, deadline)
                nbytes += len(local) * self._bytes_of(runs, entry.layout, remote.layout)
        except StaleCacheError:
            if claim is not None:
                raise
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"the peer's cache {view.cache_id} was freed while it was read; the destination"
                " holds bytes of something else",
                remedy="the peer ended the link or its instance; link again.",
            ) from None
        except LLMException:
            # Where the peer has gone, that is the news, and not what we met in its memory.
            link.check_linked()
            raise
        if link.state is not LinkState.LINKED:
            # Bytes that were read after the lease on them ended may belong to another cache.
            link.check_linked()
        if path is not None:
            instance = self._instance
            began_ns = deadline.at_ns - deadline.budget_ms * 1_000_000
            instance.transfers.record(self.operation, link.peer, path, nbytes, began_ns)
        return None if first is None or last is None else (first, last)

    def _bytes_of(self, runs: torch.Tensor, local: Layout, remote: Layout) -> int:  # noqa: ARG002
        """Bytes that runs move in each tensor; operations that know it better say so."""
        return int(runs[:, 2].sum())

    def _move_leased(self, link: Link, entry: CacheEntry, deadline: Deadline) -> RemoteCache:
        """Ask the peer for its cache, with a lease, and move; the lease goes back in every case."""
        ticket, fetched = LeaseTicket(), None
        try:
            remote = RemoteCache.of(self._request_view(link, ticket, deadline), link.channel.move)
            moved = self._move(link, entry, remote, deadline)
            # What a pull has completely read may consume the key.
            fetched = moved if self.direction is Direction.READ else None
        finally:
            # First of all, because Ctrl-C may come again: then the link does the rest.
            ticket.closed = True
            link.give_back(ticket, fetched)
        return remote

    def _request_view(self, link: Link, ticket: LeaseTicket, deadline: Deadline) -> CacheView:
        """The peer's answer, with a lease for ``ticket``.

        Where the peer says that others have to finish first, it is asked again and again.
        """
        while True:
            try:
                view, _ = link.request(self._query, deadline, None, ticket)
            except LLMException as error:
                if error.status_code != LLMStatusCode.LLM_LINK_BUSY or deadline.expired:
                    raise
            else:
                break
            time.sleep(_BUSY_PAUSE_S)
        if not isinstance(view, CacheView):
            raise error_for(
                LLMStatusCode.LLM_FAILED, f"unexpected answer {type(view).__name__}", peer=link.peer
            )
        return view


class Pull(Transfer):
    """A transfer that reads from the peer."""

    direction = Direction.READ

    def _transfer(self, link: Link, entry: CacheEntry, deadline: Deadline) -> None:
        if not self._instance.config.remote_accessible:
            self._move_leased(link, entry, deadline)
            return
        known = link.known
        query = (self._query.kind, self._query.value, self._query.index, self._query.paged)
        remote = known.get(query)
        if remote is not None and self._pull_known(link, entry, remote, deadline):
            return
        if remote is not None:
            known.forget(query)
            if remote.view.owner_validates:
                # Its bytes do not go through the owner: from now on it is asked at once.
                known.remember(query, None)
        answer = self._move_leased(link, entry, deadline)
        if query not in known:
            known.remember(query, answer)

    def _pull_known(
        self, link: Link, entry: CacheEntry, remote: RemoteCache, deadline: Deadline
    ) -> bool:
        """Pull by what the peer once said of this cache, without asking for it first.

        No message is sent, or, where bytes go through the peer, none but the request for them.

        Returns:
            Whether the bytes have landed and are right. If not, the peer has to be asked: it knows
            what has become of the cache, and what is wrong with a request.

        Raises:
            LLMTimeoutError: Not done in time.
            LLMPeerLostError: The link was lost.
        """
        claim = Claim(self._query, remote.view.cache_id, remote.view.row)
        try:
            self._move(link, entry, remote, deadline, claim)
        except LLMTimeoutError:
            raise
        except StaleCacheError:
            return False
        except LLMException:
            link.check_linked()
            return False
        return True


class Push(Transfer):
    """A transfer that writes to the peer, always under a lease: a write can't be taken back."""

    direction = Direction.WRITE

    def _transfer(self, link: Link, entry: CacheEntry, deadline: Deadline) -> None:
        self._move_leased(link, entry, deadline)

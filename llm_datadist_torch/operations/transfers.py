# SPDX-License-Identifier: Apache-2.0
"""Pull and push: check, resolve at the peer, geometry, move, release (reference API, 9.3, 9.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from llm_datadist_torch import streams
from llm_datadist_torch.cache import Cache
from llm_datadist_torch.cache_entry import CacheEntry, name_of
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.geometry import Layout
from llm_datadist_torch.instance import Instance
from llm_datadist_torch.links.held_leases import Holder
from llm_datadist_torch.links.known_caches import Known
from llm_datadist_torch.links.link import Link
from llm_datadist_torch.links.messages import CacheView, Claim, Resolve
from llm_datadist_torch.links.owner import RESOLVE_BY_ADDRESS, RESOLVE_BY_ID
from llm_datadist_torch.operations.plans import Plan, RemoteCache
from llm_datadist_torch.streams import Stream, StreamPoint
from llm_datadist_torch.transports.base import Direction, Movement
from llm_datadist_torch.values.checks import check_timeout_ms, param_error
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.status import (
    LLMException,
    LLMStatusCode,
    LLMTimeoutError,
    error_for,
)


class AddressKey(NamedTuple):
    """Names whatever cache of a peer contains an address (int64, as in ``CacheEntry.addrs``)."""

    cluster_id: int
    address: int


Key = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey | AddressKey


@dataclass(frozen=True)
class Transfer:
    """One pull or push whose arguments have been checked as far as this side can.

    Attributes:
        operation: Its public name.
        direction: READ for pulls.
        key: Names the peer and its cache.
        cache: The local cache.
        paged: The kind of cache wanted at the peer; None for either.
        check_local: Called with the local layout before anything is sent.
        plan: Called with (local layout, remote cache): which bytes move. A push may have several.
    """

    operation: str
    direction: Direction
    key: Key
    cache: Cache
    paged: bool | None
    check_local: Callable[[Layout], None]
    plan: Callable[[Layout, RemoteCache], Plan | list[Plan]]


def run(
    instance: Instance,
    transfer: Transfer,
    wait_stream: Stream | None,
    timeout: int | None = None,
) -> None:
    """Carry out a transfer; blocks until the data has landed.

    At most for ``timeout``, or ``sync_kv_timeout``. A lost link is made anew first. No byte moves
    before what is on ``wait_stream`` now is done (see :func:`streams.point`).

    Raises:
        TypeError: ``wait_stream`` is no stream.
        LLMParamError: The peer is this instance, or something does not fit.
        LLMCacheNotFoundError: The local or the peer's cache does not exist.
        LLMNotLinkedError: No link, or it was lost meanwhile.
        LLMTimeoutError: Not done in time; nothing is written any more, the link stays usable.
    """
    timeout = check_timeout(timeout)
    check_peer(instance, transfer)
    after = streams.point(wait_stream, transfer.cache.device)
    with instance.using(transfer.cache) as entry:
        run_leased(instance, transfer, entry, after, timeout)


def check_peer(instance: Instance, transfer: Transfer) -> None:
    """Check that a transfer is with somebody else.

    Raises:
        LLMParamError: The peer is this instance.
    """
    peer = transfer.key.cluster_id
    if peer == instance.cluster_id:
        raise param_error(
            f"cluster {peer} is this instance itself", remedy="use copy_blocks or copy_cache."
        )


def check_timeout(timeout: int | None) -> int | None:
    """Return a call's own time limit, checked.

    Raises:
        TypeError, ValueError, LLMParamError: As :func:`check_timeout_ms`.
    """
    return None if timeout is None else check_timeout_ms(timeout)


def run_leased(
    instance: Instance,
    transfer: Transfer,
    entry: CacheEntry,
    after: StreamPoint | None = None,
    timeout: int | None = None,
) -> None:
    """As :func:`run`, for a caller that holds a lease on the local cache.

    ``after``: What must be done before a byte moves. ``timeout`` has been checked.
    """
    _check_local(instance, transfer, entry)
    deadline, ask = instance.deadline(timeout), _question(transfer)
    link = instance.links.use(transfer.key.cluster_id, deadline)
    # Only reads: what is written to must not be freed meanwhile, and only a lease sees to that.
    keeps = instance.config.remote_accessible and transfer.direction is Direction.READ
    if after is not None:
        after.wait(deadline)
    with link.transfer(deadline):
        if keeps and _pull_known(link, transfer, entry, ask, deadline):
            return
        with _leased(link, ask, deadline) as remote:
            ways = _move(link, transfer, entry, remote, deadline)
            if transfer.direction is Direction.READ and not _memory_held(link, remote.view):
                raise _freed_meanwhile(remote.view)
            if keeps:
                view = msgspec.structs.replace(remote.view, lease_id=0)
                asks_owner = any(link.channel.asks_owner(way) for way in ways)
                link.known.put(ask, Known(view, asks_owner))


def _pull_known(
    link: Link, transfer: Transfer, entry: CacheEntry, ask: Resolve, deadline: Deadline
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
    known = link.known.get(ask)
    if known is None:
        return False
    view, holds = known.view, _binding_holds(link, known.view)
    if view.owner_validates:
        # Its memory is the peer's user's, who moves it without touching the counters.
        holds = False
    if known.asks_owner or holds:
        claim = Claim(ask, view.cache_id, view.row)
        try:
            ways = _move(link, transfer, entry, RemoteCache.of(view), deadline, claim)
        except LLMTimeoutError:
            raise
        except LLMException:
            link.check_linked()
        else:
            # Bytes may go another way than the last time; the owner has looked only if asked.
            asked = all(link.channel.asks_owner(way) for way in ways)
            if asked or (holds and _memory_held(link, view)):
                return True
    link.known.forget(ask)
    return False


def _move(
    link: Link,
    transfer: Transfer,
    entry: CacheEntry,
    remote: RemoteCache,
    deadline: Deadline,
    claim: Claim | None = None,
) -> list[str]:
    """Move all bytes of a transfer; returns the ways they went."""
    planned = transfer.plan(entry.layout, remote)
    plans = planned if isinstance(planned, list) else [planned]
    try:
        ways = [
            link.channel.move(_movement(transfer, entry, remote, plan, claim), deadline)
            for plan in plans
            if len(plan.runs)
        ]
    except LLMException:
        # Where the peer has gone, that is the news, and not what we met in its memory.
        link.check_linked()
        raise
    # Bytes that were read after the peer's lease on them ended may be anybody's.
    link.check_linked()
    if transfer.direction is Direction.READ:
        remote.fetched = (plans[0].remote.start, plans[-1].remote.stop)
    return ways


def _binding_holds(link: Link, view: CacheView) -> bool:
    """Whether the key still leads to this cache."""
    words = view.words
    now = None if words is None else link.channel.read_words(words.region, words.offset)
    return words is not None and now is not None and now[0] == words.binding


def _memory_held(link: Link, view: CacheView) -> bool:
    """Whether the cache's memory was the cache's until now, as far as we can see."""
    words = view.words
    now = None if words is None else link.channel.read_words(words.region, words.offset)
    return words is None or now is None or now[1] == words.memory


def _freed_meanwhile(view: CacheView) -> LLMException:
    return error_for(
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        f"the peer's cache {view.cache_id} was freed while it was read; the destination holds"
        " bytes of something else",
        remedy="the peer ended the link or its instance; link again.",
    )


def _check_local(instance: Instance, transfer: Transfer, entry: CacheEntry) -> None:
    if transfer.cache.cache_desc.batch_dim != 0:
        raise param_error(
            f"batch_dim_index={transfer.cache.cache_desc.batch_dim}: only 0 can be copied or"
            " transferred"
        )
    transfer.check_local(entry.layout)
    if instance.config.remote_accessible and not entry.remote_accessible:
        raise param_error(
            f"cache {entry.cache_id} is not remote accessible",
            remedy="register it with remote_accessible=True.",
        )


def _movement(
    transfer: Transfer, entry: CacheEntry, remote: RemoteCache, plan: Plan, claim: Claim | None
) -> Movement:
    return Movement(
        direction=transfer.direction,
        local_addrs=entry.addrs[plan.local.start : plan.local.stop],
        remote_addrs=remote.addrs[plan.remote.start : plan.remote.stop],
        runs=plan.runs,
        region=remote.view.region,
        lease_id=remote.view.lease_id,
        local_foreign=entry.foreign,
        remote_foreign=remote.view.foreign,
        local_device=entry.device,
        remote_device=remote.view.device,
        cache_id=remote.view.cache_id,
        claim=claim,
    )


@contextmanager
def _leased(link: Link, ask: Resolve, deadline: Deadline) -> Iterator[RemoteCache]:
    """Ask the peer for its cache, with a lease; the lease goes back in every case."""
    holder, remote = Holder(), None
    try:
        view, _ = link.request(ask, deadline, None, holder)
        if not isinstance(view, CacheView):
            raise error_for(
                LLMStatusCode.LLM_FAILED, f"unexpected answer {type(view).__name__}", peer=link.peer
            )
        remote = RemoteCache.of(view)
        yield remote
    finally:
        # First of all, because Ctrl-C may come again: then the link does the rest.
        holder.over = True
        link.give_back(holder, None if remote is None else remote.fetched)


def _question(transfer: Transfer) -> Resolve:
    key, write = transfer.key, transfer.direction is Direction.WRITE
    if isinstance(key, CacheKeyByIdAndIndex):
        return Resolve(RESOLVE_BY_ID, key.cache_id, key.batch_index, transfer.paged, write)
    if isinstance(key, AddressKey):
        return Resolve(RESOLVE_BY_ADDRESS, key.address, 0, transfer.paged, write)
    name = name_of(key)
    return Resolve(name.kind.value, name.value, name.model_id, transfer.paged, write)

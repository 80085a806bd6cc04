# SPDX-License-Identifier: Apache-2.0
"""Pull and push: check, resolve at the peer, geometry, move, release (reference API, 9.3, 9.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm_datadist_torch import geometry
from llm_datadist_torch.cache import Cache
from llm_datadist_torch.catalog import CacheEntry, name_of
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.geometry import Layout
from llm_datadist_torch.instance import Instance
from llm_datadist_torch.links.link import Link, LinkState
from llm_datadist_torch.links.messages import CacheView, Release, Resolve
from llm_datadist_torch.links.owner import RESOLVE_BY_ADDRESS, RESOLVE_BY_ID
from llm_datadist_torch.transports.base import Direction, Movement
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for


class AddressKey(NamedTuple):
    """Names whatever cache of a peer contains an address (int64, as in ``CacheEntry.addrs``)."""

    cluster_id: int
    address: int


Key = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey | AddressKey


@dataclass
class RemoteCache:
    """A peer's cache while we have a lease on it.

    Attributes:
        view: What the peer said of it.
        layout: Where its rows lie.
        addrs: Its tensors' addresses in the peer's process, int64 [num_tensors].
        fetched: Set when a pull has completely read tensors [start, stop) of the row.
    """

    view: CacheView
    layout: Layout
    addrs: torch.Tensor
    fetched: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What a transfer moves, once both caches are known.

    Attributes:
        local: Local tensors, by index.
        remote: Their partners.
        runs: int64 [n, 3], columns (local offset, remote offset, nbytes).
    """

    local: range
    remote: range
    runs: torch.Tensor


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


def run(instance: Instance, transfer: Transfer) -> None:
    """Carry out a transfer; blocks until the data has landed, at most for ``sync_kv_timeout``.

    Raises:
        LLMParamError: The peer is this instance, or something does not fit.
        LLMCacheNotFoundError: The local or the peer's cache does not exist.
        LLMNotLinkedError: No link, or it was lost meanwhile.
        LLMTimeoutError: Not done in time; nothing is written any more, the link stays usable.
    """
    check_peer(instance, transfer)
    with instance.using(transfer.cache) as entry:
        run_leased(instance, transfer, entry)


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


def run_leased(instance: Instance, transfer: Transfer, entry: CacheEntry) -> None:
    """As :func:`run`, for a caller that holds a lease on the local cache."""
    _check_local(instance, transfer, entry)
    link = instance.links.find(transfer.key.cluster_id)
    deadline = instance.deadline()
    with link.transfer(deadline), _leased(link, transfer, deadline) as remote:
        planned = transfer.plan(entry.layout, remote)
        plans = planned if isinstance(planned, list) else [planned]
        try:
            for plan in plans:
                if len(plan.runs):
                    link.channel.move(_movement(transfer, entry, remote, plan), deadline)
        except LLMException:
            # Where the peer has gone, that is the news, and not what we met in its memory.
            link.check_linked()
            raise
        # Bytes that were read after the peer's lease on them ended may be anybody's.
        link.check_linked()
        if transfer.direction is Direction.READ:
            remote.fetched = (plans[0].remote.start, plans[-1].remote.stop)


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


def _movement(transfer: Transfer, entry: CacheEntry, remote: RemoteCache, plan: Plan) -> Movement:
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
    )


@contextmanager
def _leased(link: Link, transfer: Transfer, deadline: Deadline) -> Iterator[RemoteCache]:
    """Ask the peer for its cache, with a lease; the lease goes back in every case."""
    view, _ = link.request(_question(transfer), deadline)
    if not isinstance(view, CacheView):
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"unexpected answer {type(view).__name__}", peer=link.peer
        )
    remote = RemoteCache(
        view,
        Layout(view.num_tensors, view.rows, view.row_bytes, view.pitch, view.paged),
        torch.frombuffer(bytearray(view.addrs), dtype=torch.int64),
    )
    try:
        yield remote
    finally:
        if link.state is LinkState.LINKED:
            link.post(Release(view.lease_id, remote.fetched))


def _question(transfer: Transfer) -> Resolve:
    key, write = transfer.key, transfer.direction is Direction.WRITE
    if isinstance(key, CacheKeyByIdAndIndex):
        return Resolve(RESOLVE_BY_ID, key.cache_id, key.batch_index, transfer.paged, write)
    if isinstance(key, AddressKey):
        return Resolve(RESOLVE_BY_ADDRESS, key.address, 0, transfer.paged, write)
    name = name_of(key)
    return Resolve(name.kind.value, name.value, name.model_id, transfer.paged, write)


# -- plans ----------------------------------------------------------------------------------------


def row_pull(
    batch_index: int, size: int, src_layers: range | None, dst_layers: range | None, per_layer: int
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``pull_cache``: the first bytes of the peer's row into row ``batch_index``."""

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        dst, src = geometry.pulled_tensors(
            local.num_tensors, remote.layout.num_tensors, dst_layers, src_layers, per_layer
        )
        nbytes = local.row_bytes if size == -1 else size
        return Plan(
            dst,
            src,
            geometry.row_to_row(local, remote.layout, batch_index, remote.view.row, nbytes),
        )

    return plan


def block_pull(
    src_blocks: torch.Tensor | None,
    dst_blocks: torch.Tensor,
    src_layers: range | None,
    dst_layers: range | None,
    per_layer: int,
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``pull_blocks``.

    The peer's blocks, or (``src_blocks`` None) its row, into ``dst_blocks``.
    """

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        dst, src = geometry.pulled_tensors(
            local.num_tensors, remote.layout.num_tensors, dst_layers, src_layers, per_layer
        )
        if src_blocks is None:
            return Plan(
                dst, src, geometry.row_to_blocks(local, remote.layout, dst_blocks, remote.view.row)
            )
        return Plan(
            dst, src, geometry.blocks_to_blocks(local, remote.layout, dst_blocks, src_blocks)
        )

    return plan


def row_push(src_batch_index: int, src: range, dst: range) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``push_cache``.

    One whole local row into the peer's row (section 14, 11: it must fit).
    """

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        check_remote_tensors(dst, remote)
        runs = geometry.row_to_row(
            remote.layout, local, remote.view.row, src_batch_index, local.row_bytes
        )
        return Plan(src, dst, local_first(runs))

    return plan


def block_push(
    src_blocks: torch.Tensor, dst_blocks: torch.Tensor, src: range, dst: range
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``push_blocks``: local blocks into the peer's blocks."""

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        check_remote_tensors(dst, remote)
        runs = geometry.blocks_to_blocks(remote.layout, local, dst_blocks, src_blocks)
        return Plan(src, dst, local_first(runs))

    return plan


def local_first(runs: torch.Tensor) -> torch.Tensor:
    """Geometry's runs begin with the destination; a movement's begin with this side."""
    return runs[:, [1, 0, 2]].contiguous()


def check_remote_tensors(dst: range, remote: RemoteCache) -> None:
    """Check that a push's destination tensors are in the peer's cache.

    Raises:
        LLMParamError: They aren't.
    """
    if dst.stop > remote.layout.num_tensors:
        raise param_error(
            f"dst_layer_range ends at tensor {dst.stop}, but the peer's cache has"
            f" {remote.layout.num_tensors}"
        )

# SPDX-License-Identifier: Apache-2.0
"""The owner's side of a link.

Answers what peers ask about our caches. Runs in the endpoint's thread, never blocks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind, KeyName, Resolved
from llm_datadist_torch.memory.address import HOST
from llm_datadist_torch.memory.region import RegionDescriptor
from llm_datadist_torch.memory.spans import gather, scatter
from llm_datadist_torch.net.connection import Data
from llm_datadist_torch.serving.leased_memory import (
    GrantedCache,
    check_device_memory,
    check_inside,
    copy_unowned,
)
from llm_datadist_torch.serving.messages import (
    Body,
    CacheView,
    Call,
    Called,
    Claim,
    Done,
    Note,
    ReadBytes,
    RegionFreed,
    Release,
    Resolve,
    WriteBytes,
    refused,
)
from llm_datadist_torch.serving.peer import Grant, LinkState, ServedPeer
from llm_datadist_torch.transports.base import CacheVersion, RegionView
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.llm_config import DROP, KEEP
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

RESOLVE_BY_ID = "id"
RESOLVE_BY_ADDRESS = "address"
MAX_LEASES = 1024
"""That one peer may hold at a time; it needs one per transfer."""


class Owner:
    """Answers peers out of the catalog.

    Thread safety: all methods are called from the endpoint's thread; the catalog has its own lock.

    Args:
        catalog: What this instance owns.
        consume_keys: Whether a complete pull by a request key consumes it: in two-sided mode
            (reference API, 8.5).
        orphans: What happens to keys that a peer had begun to pull when its link was lost; see
            :data:`~llm_datadist_torch.values.llm_config.ORPHAN_POLICIES`.
    """

    def __init__(self, catalog: Catalog, *, consume_keys: bool, orphans: str = KEEP) -> None:
        self.catalog = self._catalog = catalog
        self._consume_keys = consume_keys
        self._orphans = orphans
        self._lease_ids = itertools.count(1)

    def answer(
        self, link: ServedPeer, body: Body, data: bytes | Data | None
    ) -> tuple[Body, memoryview | None] | None:
        """Carry out one request.

        Returns:
            The answer and its data frame, or None for messages that want none.

        Raises:
            LLMException: The error that the peer gets instead.
        """
        if isinstance(body, Resolve):
            view = self._resolve(link, body)
            # Another thread may have ended the link meanwhile, and then nobody would end this
            # lease.
            if link.state is not LinkState.LINKED:
                self.end_grants(link)
            return view, None
        if isinstance(body, Release):
            self.release(link, body)
        elif isinstance(body, ReadBytes):
            return Done(), self._read(link, body)
        elif isinstance(body, WriteBytes):
            self._write(link, body, data or b"")
            return Done(), None
        elif isinstance(body, RegionFreed):
            link.channel.forget(body.region_id)
        elif isinstance(body, Note):
            with _understood(body.transport):
                link.channel.note_by(body.transport, body.payload)
        else:
            raise error_for(LLMStatusCode.LLM_FAILED, f"unexpected message {type(body).__name__}")
        return None

    def serve(self, link: ServedPeer, call: Call, reply: Callable[[Body], None]) -> None:
        """A peer's channel asks ours; ``reply`` is called with the answer, from any thread.

        Raises:
            LLMException: The error that the peer gets instead.
        """
        lease_id = self._claimed(link, call.lease_id, call.claim)

        def done() -> None:
            if call.claim is not None:
                self.release(link, Release(lease_id, None))

        def answer(payload: bytes | LLMException) -> None:
            done()
            reply(Called(payload) if isinstance(payload, bytes) else refused(payload))

        try:
            cache = GrantedCache(self._catalog, _granted(link, lease_id))
            with _understood(call.transport):
                link.channel.serve_by(call.transport, call.payload, cache, answer)
        except BaseException:
            done()
            raise

    def share_region(self, link: ServedPeer, region_id: int) -> RegionDescriptor:
        """The descriptor of a region that the peer was told of, to be sent to it.

        It lets the peer map the whole region. That is what the kernel allows processes of one user
        anyway where it can see them, and it is not allowed to others here either.

        Raises:
            LLMException: Why the peer can't have it.
        """
        process = link.connection.process
        if process is None or process.uid != os.geteuid():
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                "descriptors go to processes of the same user on the same host only",
            )
        shown = link.shown_regions.get(region_id)
        region = None if shown is None else shown()
        if region is None or not region.shareable:
            raise error_for(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, f"there is no region {region_id}")
        return RegionDescriptor.of(region)

    def end_leases(self, grants: dict[int, Grant]) -> None:
        """End these leases."""
        for lease_id in list(grants):
            grant = grants.pop(lease_id, None)
            if grant is not None:
                grant.lease.release()

    def end_grants(self, link: ServedPeer) -> None:
        """End all leases of a peer whose link has ended. Keys that it has not consumed stay."""
        self.end_leases(link.grants)

    def end_orphans(self, link: ServedPeer) -> None:
        """The link was lost: the keys that its peer has begun to pull follow the policy."""
        begun, link.begun = link.begun, {}
        if self._orphans == KEEP:
            return
        for name, entry in begun.items():
            self._catalog.end_orphan(entry, name, drop=self._orphans == DROP)

    # -- leases -----------------------------------------------------------------------------------

    def _resolve(self, link: ServedPeer, query: Resolve) -> CacheView:
        found = self._find_for_peer(query)
        entry, layout = found.entry, found.entry.layout
        consumes = found.consumes if self._consume_keys and not query.write else None
        if consumes is not None:
            _check_not_being_pulled(link, consumes)
        lease_id = self._lease(link, entry, consumes, write=query.write)
        if entry.generation is not None:
            link.show_region(entry.generation.region)
        if consumes is not None:
            link.begun[consumes] = entry
        if entry.region is not None:
            link.show_region(entry.region)
        return CacheView(
            lease_id=lease_id,
            cache_id=entry.cache_id,
            num_tensors=layout.num_tensors,
            rows=layout.rows,
            row_bytes=layout.row_bytes,
            row_stride_bytes=layout.row_stride_bytes,
            paged=layout.paged,
            row=found.row,
            addrs=entry.addrs.numpy().tobytes(),
            region=None if entry.region is None else RegionView.of(entry.region),
            unowned=entry.unowned,
            device=str(entry.device),
            version=_version(found),
            owner_validates=entry.flag is None,
        )

    def _claimed(self, link: ServedPeer, lease_id: int, claim: Claim | None) -> int:
        """The lease that a request comes with; the one that it claims is taken here."""
        if claim is None:
            return lease_id
        query = claim.query
        if query.write or self._consume_keys:
            raise param_error("only reads in remote-accessible mode go by a claim")
        found = self._find_for_peer(query)
        if (found.entry.cache_id, found.row) != (claim.cache_id, claim.row):
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"the key leads to cache {found.entry.cache_id}, row {found.row}, now, not to cache"
                f" {claim.cache_id}, row {claim.row}",
            )
        taken = self._lease(link, found.entry, None, write=False)
        # The thread that ends the link may have missed this lease.
        if link.leaving or link.state is not LinkState.LINKED:
            self.release(link, Release(taken, None))
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "the peer is ending the link")
        return taken

    def _lease(
        self, link: ServedPeer, entry: CacheEntry, consumes: KeyName | None, *, write: bool
    ) -> int:
        if len(link.grants) >= MAX_LEASES:
            raise error_for(
                LLMStatusCode.LLM_LINK_BUSY,
                f"the peer holds {len(link.grants)} leases, and no more than {MAX_LEASES} may be",
            )
        lease = self._catalog.acquire(entry)
        lease_id = next(self._lease_ids)
        link.grants[lease_id] = Grant(lease, entry, consumes, write)
        return lease_id

    def _find_for_peer(self, query: Resolve) -> Resolved:
        found = self._find(query)
        entry, layout = found.entry, found.entry.layout
        if not entry.remote_accessible:
            raise param_error(
                f"the peer's cache {entry.cache_id} is not remote accessible",
                remedy="its owner registers it with remote_accessible=True.",
            )
        if query.paged is not None and layout.paged != query.paged:
            kinds = ("contiguous", "a blocks cache")
            raise param_error(
                f"cache {entry.cache_id} is {kinds[layout.paged]}, the request needs"
                f" {kinds[query.paged]}"
            )
        return found

    def _find(self, query: Resolve) -> Resolved:
        if query.kind == RESOLVE_BY_ID:
            return self._catalog.resolve_id(query.value, query.index)
        if query.kind == RESOLVE_BY_ADDRESS:
            if not -(2**63) <= query.value < 2**63:
                raise param_error(f"{query.value} is no int64 address")
            return self._catalog.resolve_address(query.value)
        try:
            kind = KeyKind(query.kind)
        except ValueError:
            raise param_error(f"there are no keys of kind {query.kind!r}") from None
        return self._catalog.resolve_key(KeyName(kind, query.value, query.index))

    def release(self, link: ServedPeer, body: Release) -> None:
        """A lease comes back; what was completely fetched consumes its key."""
        grant = link.grants.pop(body.lease_id, None)
        if grant is None:
            return
        if body.fetched is not None and grant.consumes is not None:
            # Never trust a range from outside to be small.
            start, stop = (
                max(0, body.fetched[0]),
                min(grant.entry.layout.num_tensors, body.fetched[1]),
            )
            self._catalog.consume(grant.entry, grant.consumes, range(start, stop))
        if grant.consumes is not None and grant.consumes not in grant.entry.keys:
            link.begun.pop(grant.consumes, None)
        grant.lease.release()

    # -- relayed bytes ----------------------------------------------------------------------------

    def _read(self, link: ServedPeer, body: ReadBytes) -> memoryview:
        lease_id = self._claimed(link, body.lease_id, body.claim)
        try:
            return self._read_leased(link, lease_id, body.spans)
        finally:
            if body.claim is not None:
                self.release(link, Release(lease_id, None))

    def _read_leased(self, link: ServedPeer, lease_id: int, raw: bytes) -> memoryview:
        spans, entry = self._leased_spans(link, lease_id, raw, write=False)
        if not entry.unowned or entry.device != HOST:
            return gather(spans[:, 0], spans[:, 1], entry.device)
        staging = torch.empty(int(spans[:, 1].sum()), dtype=torch.uint8)
        copy_unowned(_C.read_process, staging, spans, entry)
        return staging.numpy().data

    def _write(self, link: ServedPeer, body: WriteBytes, data: bytes | Data) -> None:
        spans, entry = self._leased_spans(link, body.lease_id, body.spans, write=True)
        if int(spans[:, 1].sum()) != len(data):
            raise param_error(f"{len(data)} bytes for spans of {int(spans[:, 1].sum())}")
        if not entry.unowned or entry.device != HOST:
            scatter(spans[:, 0], spans[:, 1], data, entry.device)
            return
        staging = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        copy_unowned(_C.write_process, staging, spans, entry)

    def _leased_spans(
        self, link: ServedPeer, lease_id: int, raw: bytes, *, write: bool
    ) -> tuple[torch.Tensor, CacheEntry]:
        grant = _granted(link, lease_id)
        if write and not grant.write:
            raise param_error(f"lease {lease_id} is for reading")
        if not raw or len(raw) % 16:
            raise param_error(f"{len(raw)} bytes are no list of spans")
        grant.lease.check()
        spans = torch.frombuffer(bytearray(raw), dtype=torch.int64).view(-1, 2)
        check_inside(spans[:, 0], spans[:, 1], grant.entry)
        if grant.entry.unowned and grant.entry.device != HOST:
            check_device_memory(grant.entry)
        return spans, grant.entry


def _check_not_being_pulled(link: ServedPeer, name: KeyName) -> None:
    """Pulls of one key on one link take turns, so that a key that is consumed serves one of them.

    Raises:
        LLMException: LLM_LINK_BUSY: another pull of it is under way. The asker tries again.
    """
    if any(grant.consumes == name for grant in link.grants.values()):
        raise error_for(LLMStatusCode.LLM_LINK_BUSY, f"another pull of {name} is under way")


def _granted(link: ServedPeer, lease_id: int) -> Grant:
    grant = link.grants.get(lease_id)
    if grant is None:
        raise error_for(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, f"there is no lease {lease_id}")
    return grant


@contextmanager
def _understood(transport: str) -> Iterator[None]:
    try:
        yield
    except msgspec.DecodeError as error:
        raise param_error(f"{transport} does not understand the peer: {error}") from error


def _version(found: Resolved) -> CacheVersion | None:
    generation = found.entry.generation
    if generation is None or not generation.region.shareable:
        return None
    # The binding is the one that the key was looked up under. The memory counter can't change
    # before the lease on the cache ends.
    region = RegionView.of(generation.region)
    return CacheVersion(region, generation.offset, found.binding, generation.memory)

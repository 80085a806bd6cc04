# SPDX-License-Identifier: Apache-2.0
"""A peer's cache, as a transfer needs to know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from llm_datadist_torch.caches.entry import KeyKind, name_of
from llm_datadist_torch.serving.messages import CacheView, Resolve
from llm_datadist_torch.serving.owner import RESOLVE_BY_ADDRESS, RESOLVE_BY_ID
from llm_datadist_torch.transports.base import Movement
from llm_datadist_torch.values.checks import INT64_MAX
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.layout import Layout
from llm_datadist_torch.values.status import LLMStatusCode, error_for

ADDRESS_BYTES = 8
BLOCKS = KeyKind.BLOCKS.value


class AddressKey(NamedTuple):
    """Names whatever cache of a peer contains an address (int64, as in ``CacheEntry.addrs``)."""

    cluster_id: int
    address: int


Key = CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey | AddressKey


class RemoteCache(NamedTuple):
    """A cache that a peer has described.

    Attributes:
        view: What the peer said of it.
        layout: Where its rows lie.
        addrs: Its tensors' addresses in the peer's process, int64 [num_tensors].
        move: What moves bytes on the link to this peer; see ``LinkChannel.move``.
    """

    view: CacheView
    layout: Layout
    addrs: torch.Tensor
    move: Callable[[Movement, Deadline], str]

    @classmethod
    def of(cls, view: CacheView, move: Callable[[Movement, Deadline], str]) -> RemoteCache:
        """The cache of a peer's answer.

        Raises:
            LLMException: What it says can't be true of any cache.
        """
        layout = Layout(
            view.num_tensors, view.rows, view.row_bytes, view.row_stride_bytes, view.paged
        )
        numbers = (layout.num_tensors, layout.rows, layout.row_bytes, layout.row_stride_bytes)
        if (
            min(numbers) < 1
            or layout.row_stride_bytes < layout.row_bytes
            or (view.rows - 1) * view.row_stride_bytes + view.row_bytes > INT64_MAX
            or len(view.addrs) != layout.num_tensors * ADDRESS_BYTES
        ):
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"the peer says of its cache {view.cache_id} what no cache is: {numbers} tensors,"
                f" rows, bytes of a row and between two, and {len(view.addrs)} bytes of addresses",
            )
        addrs = torch.frombuffer(bytearray(view.addrs), dtype=torch.int64)
        return cls(view, layout, addrs, move)


def query_of(key: Key, *, paged: bool | None, write: bool) -> Resolve:
    """The question for the cache of a key.

    Args:
        key: Names the cache.
        paged: The kind of cache that is wanted; None for either.
        write: Whether it is to be written to.
    """
    if isinstance(key, CacheKeyByIdAndIndex):
        return Resolve(RESOLVE_BY_ID, key.cache_id, key.batch_index, paged, write)
    if isinstance(key, AddressKey):
        return Resolve(RESOLVE_BY_ADDRESS, key.address, 0, paged, write)
    name = name_of(key)
    return Resolve(name.kind.value, name.value, name.model_id, paged, write)

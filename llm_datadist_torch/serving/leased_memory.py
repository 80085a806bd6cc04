# SPDX-License-Identifier: Apache-2.0
"""What peers may do in the memory of caches that they have a lease on."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.serving.messages import MAX_MESSAGE_BYTES
from llm_datadist_torch.serving.peer import Grant
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import (
    LLMException,
    LLMParamError,
    LLMStatusCode,
    error_for,
    message_of,
)


class GrantedCache:
    """What transports may know of a cache that a peer has a lease on; a ``LeasedCache``.

    Raises:
        LLMCacheNotFoundError: One of its tensors has moved.
    """

    def __init__(self, catalog: Catalog, grant: Grant) -> None:
        self._catalog, self._entry = catalog, grant.entry
        self.unowned = grant.entry.unowned
        self.addrs = grant.entry.addrs
        self.extent = grant.entry.layout.extent
        self.writable = grant.write
        self._held: list[_C.Lease[CacheEntry]] = []
        grant.lease.check()

    def check(self, addrs: torch.Tensor, nbytes: torch.Tensor) -> None:
        """See ``LeasedCache``."""
        check_inside(addrs, nbytes, self._entry, limit=None)

    def acquire(self) -> None:
        """See ``LeasedCache``."""
        self._held.append(self._catalog.share(self._entry))

    def end(self) -> None:
        """See ``LeasedCache``."""
        self._held.pop().release()


def copy_unowned(
    call: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[int, int]],
    staging: torch.Tensor,
    spans: torch.Tensor,
    entry: CacheEntry,
) -> None:
    """Let the kernel copy between ``staging`` and memory that its user may be freeing right now.

    A copy of our own would crash this process there.

    Raises:
        LLMCacheNotFoundError: The memory is gone.
    """
    offsets = spans[:, 1].cumsum(0) - spans[:, 1]
    runs = torch.stack([offsets, spans[:, 0], spans[:, 1]], dim=1).contiguous()
    here = torch.tensor([staging.data_ptr()])
    _, number = call(os.getpid(), here, torch.zeros(1, dtype=torch.int64), runs)
    if number:
        raise _unreachable(entry, os.strerror(number))


def check_device_memory(entry: CacheEntry) -> None:
    """Check that the runtime still has device memory that was registered by addresses.

    Raises:
        LLMCacheNotFoundError: It is gone.
    """
    try:
        check_alive(entry.addrs, entry.layout.extent, entry.device)
    except LLMParamError as error:
        raise _unreachable(entry, message_of(error)) from error


def _unreachable(entry: CacheEntry, reason: str) -> LLMException:
    return error_for(
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        f"the memory registered as cache {entry.cache_id} can't be reached: {reason}",
        remedy=(
            "unregister a cache before its memory is freed; register tensors instead of addresses."
        ),
    )


def check_inside(
    starts: torch.Tensor,
    sizes: torch.Tensor,
    entry: CacheEntry,
    limit: int | None = MAX_MESSAGE_BYTES,
) -> None:
    """Check that a peer's spans lie inside rows of a cache and fit one message.

    Args:
        starts: Addresses, int64 [n].
        sizes: Bytes, int64 [n].
        entry: The cache.
        limit: Bytes of all of them at most; None where they go another way.

    Raises:
        LLMParamError: They don't.
    """
    layout = entry.layout
    total = _C.bytes_inside(
        starts, sizes, entry.addrs, layout.extent, layout.row_stride_bytes, layout.row_bytes
    )
    if total < 0 or (limit is not None and total > limit):
        raise param_error(
            f"the request leaves cache {entry.cache_id}, or is larger than {limit} bytes"
        )

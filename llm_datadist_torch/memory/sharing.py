# SPDX-License-Identifier: Apache-2.0
"""Tensors of caches in torch.multiprocessing: sent as the shared memory that they are.

torch sends a tensor by moving its storage into shared memory of torch's own. Memory of a region is
shared already, so for that its descriptor is sent, and nothing moves.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_storage

from llm_datadist_torch.memory.region import Region

_regions: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_installed = False


def send_as_shared_memory(region: Region) -> None:
    """Have torch.multiprocessing send the storages in a region without moving them.

    The first call registers this with multiprocessing, for this process; all other storages are
    sent as torch sends them. The receiver maps the same bytes, for as long as it has the tensor;
    they are the cache's no longer when the sender has freed the cache.
    """
    global _installed
    if not region.shareable:
        return
    with _lock:
        _regions[region.region_id] = region
        if not _installed:
            ForkingPickler.register(torch.UntypedStorage, _reduce)
            _installed = True


def _reduce(storage: torch.UntypedStorage) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """What multiprocessing pickles of a storage: how to make it there, and of what."""
    found = _find(storage)
    if found is None:
        reduced: tuple[Callable[..., object], tuple[Any, ...]] = reduce_storage(storage)  # type: ignore[no-untyped-call]
        return reduced
    region, offset = found
    return _map, (DupFd(region.fd), region.offset + offset, storage.nbytes())


def _find(storage: torch.UntypedStorage) -> tuple[Region, int] | None:
    """The region that all of a storage lies in, and where in the region."""
    if storage.device.type != "cpu" or storage.nbytes() == 0:
        return None
    try:
        start = storage.data_ptr()
    except RuntimeError:  # a fake storage
        return None
    with _lock:
        regions = list(_regions.values())
    for region in regions:
        offset = start - region.address
        if offset >= 0 and offset + storage.nbytes() <= region.nbytes:
            return region, offset
    return None


def _map(descriptor: Any, offset: int, nbytes: int) -> torch.UntypedStorage:  # noqa: ANN401
    """A storage over the bytes of a region of the sender; in the receiver."""
    file = descriptor.detach()
    try:
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(file, offset - start + nbytes, offset=start)
    finally:
        os.close(file)
    with torch.inference_mode(mode=False):
        tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset - start)
    return tensor.untyped_storage()

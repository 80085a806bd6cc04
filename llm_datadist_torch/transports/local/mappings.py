# SPDX-License-Identifier: Apache-2.0
"""A peer's shareable regions, mapped into this process when first needed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import CacheVersion, RegionView
from llm_datadist_torch.transports.local.host import HostIdentity

WORD_BYTES = 8


def _open(pid: int, descriptor: int, region: RegionView) -> _C.PeerMapping:
    return _C.PeerMapping.open(
        pid, descriptor, region.inode, region.device, region.nbytes, region.offset
    )


class PeerMappings:
    """Keeps one mapping per region.

    A mapping stays usable after :meth:`forget` and :meth:`close` for those that hold it: it is
    unmapped with its last reference.

    Thread safety: all methods may be called from any thread.

    Args:
        peer: Whose regions.
        trusted: The peer is known to be in this process. Else one that says so is not believed.
        get_descriptor: Has the peer send a descriptor of a region, which the caller owns, or
            raises OSError. For peers in PID namespaces that are not visible here. None: it is
            opened in /proc.

    Attributes:
        by_region: What is mapped, by region id, for others to look at.
    """

    def __init__(
        self,
        peer: HostIdentity,
        *,
        trusted: bool,
        get_descriptor: Callable[[RegionView], int] | None = None,
    ) -> None:
        self._peer = peer
        self._trusted = trusted
        self._get_descriptor = get_descriptor
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._forgotten: set[int] = set()
        self.by_region: dict[int, _C.PeerMapping] = {}

    def get(self, region: RegionView) -> _C.PeerMapping:
        """The mapping of a region.

        Raises:
            OSError: The kernel refuses, or the region is gone, or the pid is one of this process.
        """
        if self._get_descriptor is not None:
            return self._get_by_descriptor(region, self._get_descriptor)
        with self._lock:
            mapping = self.by_region.get(region.region_id)
            if mapping is None:
                if self._peer.is_here and not self._trusted:
                    raise PermissionError("the peer says that it is this process, and is not")
                mapping = _open(self._peer.pid, region.fd, region)
                self.by_region[region.region_id] = mapping
            return mapping

    def _get_by_descriptor(
        self, region: RegionView, get_descriptor: Callable[[RegionView], int]
    ) -> _C.PeerMapping:
        """The answer comes through the thread that calls :meth:`forget`, which must not wait."""
        with self._asking:
            mapping = self.by_region.get(region.region_id)
            if mapping is not None:
                return mapping
            self._forgotten.clear()
            descriptor = get_descriptor(region)
            try:
                mapping = _open(os.getpid(), descriptor, region)
            finally:
                os.close(descriptor)
            with self._lock:
                if region.region_id in self._forgotten:
                    raise OSError(errno.ESTALE, "the region was freed meanwhile")
                self.by_region[region.region_id] = mapping
            return mapping

    def find(self, region: RegionView) -> _C.PeerMapping | None:
        """The mapping of a region; None where it can't be mapped."""
        try:
            return self.get(region)
        except OSError:
            return None

    def read(self, version: CacheVersion) -> tuple[int, int] | None:
        """The counters of a version as they are now; None where they can't be mapped."""
        try:
            _mapping, first = self.counters(version)
        except OSError:
            return None
        return _C.load_word(first), _C.load_word(first + WORD_BYTES)

    def counters(self, version: CacheVersion) -> tuple[_C.PeerMapping, int]:
        """What keeps the counters of a version mapped, and the address of the first.

        Raises:
            OSError: As :meth:`get`, or they are not in their region.
        """
        offset, nbytes = version.offset, version.region.nbytes
        if offset % WORD_BYTES or not 0 <= offset <= nbytes - 2 * WORD_BYTES:
            raise OSError(errno.EINVAL, f"counters at {offset} are not in {nbytes} bytes")
        mapping = self.get(version.region)
        return mapping, mapping.address + offset

    def forget(self, region_id: int) -> None:
        """Unmap a region as soon as nothing uses it."""
        with self._lock:
            self.by_region.pop(region_id, None)
            if self._asking.locked():
                self._forgotten.add(region_id)

    def close(self) -> None:
        """Unmap everything that nothing uses."""
        with self._lock:
            self.by_region.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the peer's memory that are mapped here."""
        return sum(mapping.nbytes for mapping in self.by_region.values())

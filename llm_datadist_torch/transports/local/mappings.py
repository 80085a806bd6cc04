# SPDX-License-Identifier: Apache-2.0
"""A peer's shareable regions, mapped into this process when first needed."""

from __future__ import annotations

import threading

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import CacheVersion, RegionView
from llm_datadist_torch.transports.local.host import HostIdentity

WORD_BYTES = 8


class PeerMappings:
    """Keeps one mapping per region.

    A mapping stays usable after :meth:`forget` and :meth:`close` for those that hold it: it is
    unmapped with its last reference.

    Thread safety: all methods may be called from any thread.

    Args:
        peer: Whose regions.
        trusted: The peer is known to be in this process. Else one that says so is not believed.

    Attributes:
        by_region: What is mapped, by region id, for others to look at.
    """

    def __init__(self, peer: HostIdentity, *, trusted: bool) -> None:
        self._peer = peer
        self._trusted = trusted
        self._lock = threading.Lock()
        self.by_region: dict[int, _C.PeerMapping] = {}

    def get(self, region: RegionView) -> _C.PeerMapping:
        """The mapping of a region.

        Raises:
            OSError: The kernel refuses, or the region is gone, or the pid is one of this process.
        """
        with self._lock:
            mapping = self.by_region.get(region.region_id)
            if mapping is None:
                if self._peer.is_here and not self._trusted:
                    raise PermissionError("the peer says that it is this process, and is not")
                mapping = _C.PeerMapping.open(
                    self._peer.pid,
                    region.fd,
                    region.inode,
                    region.device,
                    region.nbytes,
                    region.offset,
                )
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
        offset, nbytes = version.offset, version.region.nbytes
        if offset % WORD_BYTES or not 0 <= offset <= nbytes - 2 * WORD_BYTES:
            return None
        mapping = self.find(version.region)
        if mapping is None:
            return None
        first = mapping.address + offset
        return _C.load_word(first), _C.load_word(first + WORD_BYTES)

    def forget(self, region_id: int) -> None:
        """Unmap a region as soon as nothing uses it."""
        with self._lock:
            self.by_region.pop(region_id, None)

    def close(self) -> None:
        """Unmap everything that nothing uses."""
        with self._lock:
            self.by_region.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the peer's memory that are mapped here."""
        return sum(mapping.nbytes for mapping in self.by_region.values())

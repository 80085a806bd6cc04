# SPDX-License-Identifier: Apache-2.0
"""A peer's shareable regions, mapped into this process when first needed."""

from __future__ import annotations

import threading

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import RegionView

WORD_BYTES = 8


class PeerMappings:
    """Keeps one mapping per region.

    Whoever holds a mapping may go on using it after :meth:`forget` and :meth:`close`: it is
    unmapped with its last reference.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._lock = threading.Lock()
        self._mappings: dict[int, _C.PeerMapping] = {}

    def get(self, region: RegionView) -> _C.PeerMapping:
        """The mapping of a region.

        Raises:
            OSError: The kernel refuses, or the region is gone.
        """
        with self._lock:
            mapping = self._mappings.get(region.region_id)
            if mapping is None:
                mapping = _C.PeerMapping.open(
                    self._pid, region.fd, region.inode, region.device, region.nbytes
                )
                self._mappings[region.region_id] = mapping
            return mapping

    def read_words(self, region: RegionView, offset: int) -> tuple[int, int] | None:
        """Two counters in a region; None where it can't be mapped."""
        if offset % WORD_BYTES or not 0 <= offset <= region.nbytes - 2 * WORD_BYTES:
            return None
        try:
            mapping = self.get(region)
        except OSError:
            return None
        first = mapping.address + offset
        return _C.load_word(first), _C.load_word(first + WORD_BYTES)

    def forget(self, region_id: int) -> None:
        """Unmap a region as soon as nothing uses it."""
        with self._lock:
            self._mappings.pop(region_id, None)

    def close(self) -> None:
        """Unmap everything that nothing uses."""
        with self._lock:
            self._mappings.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the peer's memory that are mapped here."""
        return sum(mapping.nbytes for mapping in self._mappings.values())

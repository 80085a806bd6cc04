# SPDX-License-Identifier: Apache-2.0
"""MemInfo: one span of memory, as remap_registered_memory takes it."""

from __future__ import annotations

from llm_datadist_torch.values.checks import check_isinstance
from llm_datadist_torch.values.enums import Memtype


class MemInfo:
    """One span of memory (reference API, 7.5). Owns nothing.

    Args:
        mem_type: what memory it is.
        addr: its address; whether it may be zero is for the caller of `MemInfo` to say.
        size: its bytes.

    As in the reference, None passes for all three.

    Raises:
        TypeError: an argument of a wrong type (a bool is not an address).
    """

    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        self._mem_type = check_isinstance("mem_type", mem_type, Memtype)
        if isinstance(addr, bool):
            raise TypeError(f"addr only support int, but got bool {addr!r}")
        self._addr = check_isinstance("addr", addr, int)
        self._size = check_isinstance("size", size, int)

    @property
    def mem_type(self) -> Memtype:
        """What memory it is."""
        return self._mem_type

    @property
    def addr(self) -> int:
        """Its address."""
        return self._addr

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._size

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self._mem_type}, addr={self._addr}, size={self._size})"

# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious models of what the C++ code does, for property tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def copy_blocks(tensor: bytearray, block: int, src_ids: list[int], dst_ids: list[int]) -> None:
    """Snapshot semantics: read everything as it was, then write."""
    before = bytes(tensor)
    for src, dst in zip(src_ids, dst_ids, strict=True):
        tensor[dst * block : (dst + 1) * block] = before[src * block : (src + 1) * block]


def swap_blocks(
    dst: bytearray, src: bytes, block: int, dst_ids: list[int], src_ids: list[int]
) -> None:
    """A one-way copy, block by block."""
    for d, s in zip(dst_ids, src_ids, strict=True):
        dst[d * block : (d + 1) * block] = src[s * block : (s + 1) * block]


def copy_rows(
    dst: bytearray,
    src: bytes,
    rows: tuple[int, int],
    strides: tuple[int, int],
    span: tuple[int, int],
) -> None:
    """Bytes span[0] .. span[0] + span[1] of one row; (destination, source) rows and strides."""
    (dst_row, src_row), (dst_stride, src_stride), (offset, nbytes) = rows, strides, span
    to, at = dst_row * dst_stride + offset, src_row * src_stride + offset
    dst[to : to + nbytes] = bytes(src[at : at + nbytes])


def block_runs(
    dst_ids: list[int],
    src_ids: list[int],
    dst_row_stride_bytes: int,
    src_row_stride_bytes: int,
    nbytes: int,
) -> list[list[int]]:
    """One run per block, joined with the one before where both sides continue it."""
    runs: list[list[int]] = []
    for dst, src in zip(dst_ids, src_ids, strict=True):
        to, at = dst * dst_row_stride_bytes, src * src_row_stride_bytes
        if runs and runs[-1][0] + runs[-1][2] == to and runs[-1][1] + runs[-1][2] == at:
            runs[-1][2] += nbytes
        else:
            runs.append([to, at, nbytes])
    return runs


class CatalogModel:
    """Who keeps a cache alive (reference API, 8.5), written down as plainly as possible.

    A key is ("request" or "prefix", id, model_id) or ("blocks", model_id); None is a placeholder.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.caches: dict[int, dict] = {}

    @property
    def keys(self) -> dict[tuple, tuple[int, int]]:
        """Key -> (cache id, row), over all caches."""
        return {
            key: (cache_id, row)
            for cache_id, cache in self.caches.items()
            for key, row in cache["keys"].items()
        }

    @property
    def pages_used(self) -> int:
        return sum(cache["pages"] for cache in self.caches.values())

    def fault(self, rows: int, keys: list, *, pages: int, paged: bool) -> str | None:
        """What a creation must fail with: "memory", "keys", or None."""
        if self.pages_used + pages > self.pages:
            return "memory"
        real = [key for key in keys if key is not None]
        too_many = len(keys) > rows and not paged
        if too_many or len(set(real)) < len(real) or set(real) & set(self.keys):
            return "keys"
        return None

    def add(self, cache_id: int, keys: list, *, pages: int, paged: bool, owned: bool) -> None:
        rows = {key: row for row, key in enumerate(keys) if key is not None}
        self.caches[cache_id] = {
            "keys": rows, "pages": pages, "paged": paged, "owned": owned, "held": True
        }  # fmt: skip

    def deallocate(self, cache_id: int) -> None:
        cache = self.caches.get(cache_id)
        if cache and cache["owned"]:
            cache["held"] = False
            if cache["paged"]:
                cache["keys"] = {}
            self._collect()

    def unregister(self, cache_id: int) -> bool:
        """False: it is allocated, and refused."""
        cache = self.caches.get(cache_id)
        if cache and cache["owned"]:
            return False
        self.caches.pop(cache_id, None)
        return True

    def remove_key(self, key: tuple | None) -> None:
        for cache in self.caches.values():
            if cache["owned"]:
                cache["keys"].pop(key, None)
        self._collect()

    def _collect(self) -> None:
        for cache_id, cache in list(self.caches.items()):
            if not cache["held"] and not cache["keys"]:
                del self.caches[cache_id]


# -- transfers between two caches -----------------------------------------------------------------


class NotAllowedError(Exception):
    """The transfer must be refused, and no byte written."""


@dataclass
class Rows:
    """A cache and the bytes around it: where its tensors start, how many rows they have."""

    memory: bytearray
    starts: Sequence[int]
    rows: int
    row_bytes: int
    row_stride_bytes: int

    def place(self, tensor: int, row: int) -> int:
        if not 0 <= tensor < len(self.starts) or not 0 <= row < self.rows:
            raise NotAllowedError
        return self.starts[tensor] + row * self.row_stride_bytes


def _layers(layers: range | None, per_layer: int, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    tensors = [layer * per_layer + k for layer in layers for k in range(per_layer)]
    if not tensors or max(tensors) >= count:
        raise NotAllowedError
    return tensors


def pulled(
    dst: Rows, src: Rows, dst_layers: range | None, src_layers: range | None, per_layer: int
) -> list[tuple[int, int]]:
    """Pairs of tensors that a pull fills (destination, source)."""
    ranges = dst_layers is not None or src_layers is not None
    if ranges and len(dst.starts) % per_layer:
        raise NotAllowedError
    to = _layers(dst_layers, per_layer, len(dst.starts))
    of = _layers(src_layers, per_layer, len(src.starts))
    if len(to) != len(of):
        raise NotAllowedError
    return list(zip(to, of, strict=True))


def pushed(
    dst: Rows, src: Rows, dst_layers: range | None, src_layers: range | None, per_layer: int
) -> list[tuple[int, int]]:
    """Pairs of tensors that a push fills; a missing range is all layers of the source."""
    if len(src.starts) % per_layer:
        raise NotAllowedError
    everything = range(len(src.starts) // per_layer)
    to = _layers(dst_layers or everything, per_layer, len(dst.starts))
    of = _layers(src_layers or everything, per_layer, len(src.starts))
    if len(to) != len(of):
        raise NotAllowedError
    return list(zip(to, of, strict=True))


def move_row(
    dst: Rows, src: Rows, pairs: list[tuple[int, int]], dst_row: int, src_row: int, size: int
) -> None:
    """The first ``size`` bytes of a row."""
    if size > min(dst.row_bytes, src.row_bytes):
        raise NotAllowedError
    for to, of in pairs:
        here, there = dst.place(to, dst_row), src.place(of, src_row)
        dst.memory[here : here + size] = src.memory[there : there + size]


def move_blocks(
    dst: Rows, src: Rows, pairs: list[tuple[int, int]], dst_ids: list[int], src_ids: list[int]
) -> None:
    """Block by block; nothing moves unless all of it may."""
    wrong = dst.row_bytes != src.row_bytes or len(dst_ids) != len(src_ids) or not dst_ids
    if wrong or len(set(dst_ids)) < len(dst_ids):
        raise NotAllowedError
    for to, of in pairs:
        for block, other in zip(dst_ids, src_ids, strict=True):
            here, there = dst.place(to, block), src.place(of, other)
            dst.memory[here : here + dst.row_bytes] = src.memory[there : there + dst.row_bytes]


def cut_row(
    dst: Rows, src: Rows, pairs: list[tuple[int, int]], dst_ids: list[int], src_row: int
) -> None:
    """One row into blocks, in order; the last piece may be short."""
    size = dst.row_bytes
    too_many = (len(dst_ids) - 1) * size >= src.row_bytes
    if size > src.row_bytes or too_many or not dst_ids or len(set(dst_ids)) < len(dst_ids):
        raise NotAllowedError
    for to, of in pairs:
        row = src.memory[src.place(of, src_row) :][: src.row_bytes]
        for k, block in enumerate(dst_ids):
            piece = row[k * size : (k + 1) * size]
            here = dst.place(to, block)
            dst.memory[here : here + len(piece)] = piece

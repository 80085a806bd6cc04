# SPDX-License-Identifier: Apache-2.0
"""How an attention backend lays out its KV, and how it is registered: the only place that knows.

A layer has one or more *parts*, tensors ``[num_blocks, ...]``: K and V together (CPU), K and V
apart (Ascend), the two or three caches of (sparse) MLA. Each part is registered as one blocks cache
of whole pages and, where its pages can be cut, again as caches of finer *units*: the tokens of a
sub-block of one head. So blocks of other sizes, and some of the heads, are moved by the same
``pull_blocks`` as whole pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec
import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException

MIN_SUB_BLOCK = 16
"""Tokens of the smallest unit; the others have twice as many as the one before."""

WHOLE_PAGE = 0
"""In place of a unit's tokens: the unit is a whole page, however it is arranged inside."""


class Cut(str, Enum):
    """How a page of ``block_size`` tokens lies in memory; N tokens, H heads, D elements."""

    TOKEN_MAJOR = "token-major"  # noqa: S105
    """``[N, H, D]``: sub-blocks are contiguous, heads are not."""
    HEAD_MAJOR = "head-major"
    """``[H, N, D]``: a sub-block of a head is contiguous."""
    K_TRANSPOSED = "K transposed"
    """``[H, (D, N) of K then (N, D) of V]``: a sub-block of a head is 2*D contiguous stretches."""
    OPAQUE = "opaque"
    """Not known: only whole pages can be moved."""


class PartLayout(msgspec.Struct, frozen=True):
    """One tensor of each layer.

    Attributes:
        cut: How its pages lie in memory.
        heads: Heads in a page.
        width: Elements of one token and head; with ``Cut.K_TRANSPOSED`` those of K and V.
        page_bytes: Bytes of a page.
    """

    cut: Cut
    heads: int
    width: int
    page_bytes: int


class GroupLayout(msgspec.Struct, frozen=True):
    """One blocks cache; its index in :attr:`KVLayout.groups` is its ``model_id``.

    Attributes:
        part: Which tensor of each layer.
        tokens: Tokens of a unit, ``WHOLE_PAGE`` for pages.
        unit_bytes: Bytes of a unit, the cache's rows.
        units_per_block: Units of a page.
    """

    part: int
    tokens: int
    unit_bytes: int
    units_per_block: int


class KVLayout(msgspec.Struct, frozen=True):
    """What one worker's KV is like; peers compare theirs before a byte moves.

    Attributes:
        block_size: Tokens of a block.
        num_blocks: Blocks of this worker; peers' may differ.
        dtype: Element type.
        arrangement: Attention backend and kernel.
        tp_rank: This worker among those that share the heads.
        tp_size: How many those are.
        total_kv_heads: Heads of the model; 1 with MLA.
        layers: Their names, in order.
        parts: The tensors of each layer.
        groups: Blocks caches: pages of all parts, then units of ``MIN_SUB_BLOCK`` tokens of all
            parts, then of twice as many... So a group's index depends on its part and unit only.
        why_whole: Why pages can't be cut; empty if they can.
    """

    block_size: int
    num_blocks: int
    dtype: str
    arrangement: str
    tp_rank: int
    tp_size: int
    total_kv_heads: int
    layers: tuple[str, ...]
    parts: tuple[PartLayout, ...]
    groups: tuple[GroupLayout, ...]
    why_whole: str

    def heads_of(self, tp_rank: int, tp_size: int) -> range:
        """Heads of the model that a rank has. With more ranks than heads several have the same."""
        if self.total_kv_heads >= tp_size:
            count = self.total_kv_heads // tp_size
            return range(tp_rank * count, (tp_rank + 1) * count)
        first = tp_rank * self.total_kv_heads // tp_size
        return range(first, first + 1)

    @property
    def heads(self) -> range:
        """Heads of the model that this rank has."""
        return self.heads_of(self.tp_rank, self.tp_size)


def describe(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    *,
    block_size: int,
    tp_rank: int,
    tp_size: int,
    total_kv_heads: int,
    arrangement: str,
) -> tuple[KVLayout, list[list[torch.Tensor]]]:
    """The layout of a worker's KV, and what is to be registered.

    Args:
        kv_caches: By layer name, one tensor ``[num_blocks, kv_heads, block_size, 2*head_dim]``
            (vLLM's CPU backend), or a sequence of tensors ``[num_blocks, block_size, kv_heads,
            head_dim]`` (vllm-ascend: K and V, the two caches of MLA, the three of sparse MLA).
        block_size: Tokens of a block.
        tp_rank: This worker among those that share the heads.
        tp_size: How many those are.
        total_kv_heads: Heads of the model.
        arrangement: Attention backend and kernel, "cpu/vec" or the like; peers' must be equal.

    Returns:
        The layout, and per group the tensors, one per layer in order: uint8 views ``[units,
        unit_bytes]`` of vLLM's memory, for ``register_blocks_cache``. Nothing is copied.

    Raises:
        LLMParamError: A layout that can't be served, with the reason.
    """
    if not kv_caches:
        raise param_error("there are no KV caches")
    columns = _columns(kv_caches)
    first = [column[0] for column in columns]
    if total_kv_heads % tp_size and tp_size % total_kv_heads:
        raise param_error(f"{total_kv_heads} KV heads can't be shared by {tp_size} workers")
    fused = isinstance(next(iter(kv_caches.values())), torch.Tensor)
    heads = max(1, total_kv_heads // tp_size)
    parts = tuple(
        _cpu_part(tensor, block_size, heads, arrangement)
        if fused
        else _split_part(tensor, block_size, heads)
        for tensor in first
    )
    why_whole = _why_whole(parts, first, arrangement)
    groups = tuple(_groups(parts, block_size, cut=not why_whole))
    layout = KVLayout(
        block_size=block_size,
        num_blocks=first[0].shape[0],
        dtype=str(first[0].dtype),
        arrangement=arrangement,
        tp_rank=tp_rank,
        tp_size=tp_size,
        total_kv_heads=total_kv_heads,
        layers=tuple(kv_caches),
        parts=parts,
        groups=groups,
        why_whole=why_whole,
    )
    views = [[_units(tensor, group) for tensor in columns[group.part]] for group in groups]
    return layout, views


def unit_table(part: PartLayout, block_size: int, tokens: int) -> torch.Tensor:
    """Which units of a page hold which tokens of which head.

    Args:
        part: The page's layout; not ``Cut.OPAQUE``.
        block_size: Tokens of the page.
        tokens: Tokens of a unit; divides ``block_size``.

    Returns:
        int64 ``[heads, sub-blocks, n]``: the n units of a head's sub-block, in an order that does
        not depend on the block size. ``Cut.TOKEN_MAJOR`` has all heads in one: ``heads`` is 1.
    """
    subs = block_size // tokens
    sub = torch.arange(subs)
    if part.cut is Cut.TOKEN_MAJOR:
        return sub.view(1, subs, 1)
    head = torch.arange(part.heads).view(-1, 1, 1)
    if part.cut is Cut.HEAD_MAJOR:
        return head * subs + sub.view(1, subs, 1)
    dim = torch.arange(part.width // 2)
    keys = dim * subs + sub.view(subs, 1)
    values = len(dim) * subs + sub.view(subs, 1) * len(dim) + dim
    return head * (part.width * subs) + torch.cat((keys, values), 1)


def _columns(
    kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
) -> list[list[torch.Tensor]]:
    """The tensors of each part, over all layers; alike in all layers."""
    rows: list[tuple[torch.Tensor, ...]] = []
    for name, given in kv_caches.items():
        row = (given,) if isinstance(given, torch.Tensor) else tuple(given)
        if not 1 <= len(row) <= 3 or not all(isinstance(each, torch.Tensor) for each in row):
            raise _refused(name, f"it has {len(row)} caches; 1 (K and V together) to 3 are known")
        for at, tensor in enumerate(row):
            if rows and (len(row) != len(rows[0]) or _like(tensor) != _like(rows[0][at])):
                raise _refused(name, "it is not like the other layers; hybrid models are not known")
            if tensor.dim() != 4:
                raise _refused(name, f"shape {list(tensor.shape)} has not 4 dimensions")
            if not tensor[0].is_contiguous():
                raise _refused(name, f"strides {list(tensor.stride())}: a page lies in pieces")
            if tensor.shape[0] != row[0].shape[0]:
                raise _refused(name, "its caches have different numbers of blocks")
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]


def _like(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _cpu_part(tensor: torch.Tensor, block_size: int, heads: int, arrangement: str) -> PartLayout:
    if not arrangement.lower().startswith("cpu"):
        raise param_error(
            f"K and V share a tensor {list(tensor.shape)}, and the backend {arrangement!r} is none"
            " of which that is known",
        )
    _, in_page, tokens, width = tensor.shape
    if (in_page, tokens) != (heads, block_size) or width % 2:
        raise param_error(
            f"shape {list(tensor.shape)} is not [num_blocks, {heads} heads, {block_size} tokens,"
            " K and V]"
        )
    known = arrangement.lower().endswith(("/vec", "/vec16")) and tensor.dtype.itemsize > 1
    return PartLayout(
        Cut.K_TRANSPOSED if known else Cut.OPAQUE, heads, width, tensor[0].numel() * tensor.itemsize
    )


def _split_part(tensor: torch.Tensor, block_size: int, heads: int) -> PartLayout:
    _, tokens, in_page, width = tensor.shape
    if (tokens, in_page) != (block_size, heads):
        raise param_error(
            f"shape {list(tensor.shape)} is not [num_blocks, {block_size} tokens, {heads} heads,"
            " width]"
        )
    # One head: both orders are the same, and heads can be told apart.
    cut = Cut.HEAD_MAJOR if heads == 1 else Cut.TOKEN_MAJOR
    return PartLayout(cut, heads, width, tensor[0].numel() * tensor.itemsize)


def _why_whole(
    parts: Sequence[PartLayout], tensors: Sequence[torch.Tensor], arrangement: str
) -> str:
    if any(part.cut is Cut.OPAQUE for part in parts):
        return f"how {arrangement} arranges {tensors[0].dtype} inside a page is not known"
    if any(not tensor.is_contiguous() for tensor in tensors):
        return "the pages of a layer lie apart, so finer units have no equal distances"
    return ""


def _groups(parts: Sequence[PartLayout], block_size: int, *, cut: bool) -> list[GroupLayout]:
    groups = [GroupLayout(at, WHOLE_PAGE, part.page_bytes, 1) for at, part in enumerate(parts)]
    tokens = MIN_SUB_BLOCK
    while cut and block_size % tokens == 0:
        for at, part in enumerate(parts):
            units = unit_table(part, block_size, tokens).numel()
            groups.append(GroupLayout(at, tokens, part.page_bytes // units, units))
        tokens *= 2
    return groups


def _units(tensor: torch.Tensor, group: GroupLayout) -> torch.Tensor:
    # From the page's dimensions to bytes without a copy: only dimension 0 may be strided.
    pages = tensor.detach().flatten(1).view(torch.uint8)
    if group.tokens == WHOLE_PAGE:
        return pages
    return pages.view(tensor.shape[0] * group.units_per_block, group.unit_bytes)


def _refused(layer: str, reason: str) -> LLMException:
    return param_error(f"the KV of layer {layer!r} can't be served: {reason}")

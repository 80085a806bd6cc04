# SPDX-License-Identifier: Apache-2.0
"""How an attention backend lays out its KV, and how it is registered: the only place that knows.

A KV cache *group* is a set of layers that share block tables; a model with sliding windows and full
attention side by side has several. A layer has one or more tensors ``[rows, ...]``: K and V
together (CPU), K and V apart (Ascend), the caches of (sparse) MLA, scales of a quantised cache, or
the states of a recurrent layer. The layers of a group whose tensors at one position are alike are a
*part*. Each part is registered as one blocks cache of whole pages and, where its pages can be cut,
again as caches of finer *units*: the tokens of a sub-block of one head. So blocks of other sizes,
and some of the heads, are moved by the same ``pull_blocks`` as whole pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException
from llm_datadist_torch.vllm.spans import flat_rows, memory_order

LayerTensors = torch.Tensor | Sequence[torch.Tensor]
"""What vLLM registers for one layer."""

MIN_SUB_BLOCK = 16
"""Tokens of the smallest unit of all heads; the others have twice as many as the one before."""

WHOLE_PAGE = 0
"""In place of a unit's tokens: the unit is a whole page, however it is arranged inside."""

ONE_TOKEN = 1
"""Tokens of a unit that is one head of one token: where heads lie side by side."""

MAX_TENSORS = 4
"""Tensors of a layer."""


class Kind(str, Enum):
    """What the blocks of a KV cache group hold."""

    ATTENTION = "attention"
    """K and V of all tokens."""
    WINDOW = "window"
    """K and V of the last tokens; the blocks before them are null blocks."""
    STATE = "state"
    """The state after the last token, in one block."""


class Cut(str, Enum):
    """How a page of N tokens lies in memory; H heads, D elements."""

    TOKEN_MAJOR = "token-major"  # noqa: S105
    """``[N, H, D]``: sub-blocks are contiguous, heads are not."""
    HEAD_MAJOR = "head-major"
    """``[H, N, D]``: a sub-block of a head is contiguous."""
    K_TRANSPOSED = "K transposed"
    """``[H, (D, N) of K then (N, D) of V]``: a sub-block of a head is 2*D contiguous stretches
    (findings/vllm_cpu_page_is_transposed.sh)."""
    OPAQUE = "opaque"
    """Not known: only whole pages can be moved."""


class GroupLayout(msgspec.Struct, frozen=True):
    """One KV cache group.

    Attributes:
        kind: What its blocks hold.
        block_size: Tokens of a block; 0 for states.
        window: Tokens that the next one looks back at, itself included; 0 if it sees all.
        spare_blocks: Blocks after the one with the state, for speculative tokens.
    """

    kind: Kind
    block_size: int
    window: int = 0
    spare_blocks: int = 0


class PartLayout(msgspec.Struct, frozen=True):
    """One tensor of each of some layers of a group.

    Attributes:
        group: Index of the group.
        role: Position of the tensor among those of its layer.
        layers: The layers, in order.
        dtype: Element type.
        cut: How its pages lie in memory.
        heads: Heads in a page.
        total_heads: Heads of the model; 1 where all workers have the same.
        width: Elements of one token and head; with ``Cut.K_TRANSPOSED`` those of K and V.
        tokens: Tokens of a page; 0 for states.
        page_bytes: Bytes of a page.
        pages_per_block: Pages of a block: some kernels want smaller blocks than the engine has.
    """

    group: int
    role: int
    layers: tuple[str, ...]
    dtype: str
    cut: Cut
    heads: int
    total_heads: int
    width: int
    tokens: int
    page_bytes: int
    pages_per_block: int


class CacheLayout(msgspec.Struct, frozen=True):
    """One blocks cache; its index in :attr:`KVLayout.caches` is its ``model_id``.

    Attributes:
        part: Index of the part.
        tokens: Tokens of a unit, ``WHOLE_PAGE`` for pages.
        unit_bytes: Bytes of a unit, the cache's rows.
        units_per_page: Units of a page.
    """

    part: int
    tokens: int
    unit_bytes: int
    units_per_page: int


class KVLayout(msgspec.Struct, frozen=True):
    """What one worker's KV is like; peers compare theirs before a byte moves.

    Attributes:
        arrangement: Attention backend and kernel.
        tp_rank: This worker among those that share the heads.
        tp_size: How many those are.
        pp_rank: This worker's stage among those that share the layers.
        pp_size: How many those are.
        groups: The KV cache groups.
        parts: Whole pages of these are the first caches, in the same order.
        caches: Blocks caches.
        why_whole: Why pages can't be cut; empty if they can.
    """

    arrangement: str
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    groups: tuple[GroupLayout, ...]
    parts: tuple[PartLayout, ...]
    caches: tuple[CacheLayout, ...]
    why_whole: str


@dataclass(frozen=True)
class GroupSpec:
    """What is known of a KV cache group besides its tensors.

    Attributes:
        layout: What peers are told of it.
        layers: Its layers.
        heads: KV heads of the model, by layer; 1 with MLA.
    """

    layout: GroupLayout
    layers: tuple[str, ...]
    heads: Mapping[str, int]


def heads_of(total_heads: int, tp_rank: int, tp_size: int) -> range:
    """Heads of the model that a rank has. With more ranks than heads several have the same."""
    if total_heads >= tp_size:
        count = total_heads // tp_size
        return range(tp_rank * count, (tp_rank + 1) * count)
    first = tp_rank * total_heads // tp_size
    return range(first, first + 1)


def describe(
    kv_caches: Mapping[str, LayerTensors],
    groups: Sequence[GroupSpec],
    *,
    arrangement: str,
    num_blocks: int = 0,
    tp_rank: int = 0,
    tp_size: int = 1,
    pp_rank: int = 0,
    pp_size: int = 1,
) -> tuple[KVLayout, list[list[torch.Tensor]]]:
    """The layout of a worker's KV, and what is to be registered.

    Args:
        kv_caches: By layer name, the layer's tensor, or its tensors. Dimension 0 is the blocks; a
            leading dimension of 2 (K and V) is taken apart. Layers that share a tensor with one
            before them are left out: they write nothing of their own.
        groups: The KV cache groups.
        arrangement: Attention backend and kernel, "cpu/vec" or the like; peers' must be equal.
        num_blocks: Blocks of the engine; 0: as many as the first tensor has rows.
        tp_rank: This worker among those that share the heads.
        tp_size: How many those are.
        pp_rank: This worker's stage.
        pp_size: How many those are.

    Returns:
        The layout, and per cache the tensors, one per layer in order: uint8 views ``[units,
        unit_bytes]`` of vLLM's memory, for ``register_blocks_cache``. Nothing is copied.

    Raises:
        LLMParamError: A layout that can't be served, with the reason.
    """
    found: dict[tuple[object, ...], tuple[PartLayout, list[torch.Tensor]]] = {}
    for index, group in enumerate(groups):
        for total in set(group.heads.values()):
            if total % tp_size and tp_size % total:
                raise param_error(f"{total} KV heads can't be shared by {tp_size} workers")
        for name, tensors in _own_layers(kv_caches, group).items():
            rows = num_blocks or tensors[0].shape[0]
            num_blocks = rows
            for role, tensor in enumerate(tensors):
                part = _part(name, tensor, role, index, group, arrangement, rows, tp_size)
                key = (msgspec.structs.replace(part, layers=()), _like(tensor))
                known, column = found.setdefault(key, (part, []))
                if column:
                    part = msgspec.structs.replace(known, layers=(*known.layers, name))
                    found[key] = part, column
                column.append(tensor)
    if not found:
        raise param_error("there are no KV caches")
    parts = tuple(part for part, _ in found.values())
    columns = [column for _, column in found.values()]
    why_whole = _why_whole(parts, columns, arrangement)
    caches = tuple(_caches(parts, cut=not why_whole))
    layout = KVLayout(
        arrangement=arrangement,
        tp_rank=tp_rank,
        tp_size=tp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        groups=tuple(group.layout for group in groups),
        parts=parts,
        caches=caches,
        why_whole=why_whole,
    )
    views = [[_units(tensor, cache) for tensor in columns[cache.part]] for cache in caches]
    return layout, views


def unit_table(part: PartLayout, tokens: int) -> torch.Tensor:
    """Which units of a page hold which tokens of which head.

    Args:
        part: The page's layout; not ``Cut.OPAQUE``.
        tokens: Tokens of a unit; divides those of the page. ``ONE_TOKEN`` not for
            ``Cut.K_TRANSPOSED``.

    Returns:
        int64 ``[heads, sub-blocks, n]``: the n units of a head's sub-block, in an order that does
        not depend on the block size. ``Cut.TOKEN_MAJOR`` has all heads in one unit, and ``heads``
        is 1, unless the units are of one token.
    """
    subs = part.tokens // tokens
    sub = torch.arange(subs)
    if part.cut is Cut.TOKEN_MAJOR:
        if tokens == ONE_TOKEN:
            head = torch.arange(part.heads).view(-1, 1, 1)
            return sub.view(1, subs, 1) * part.heads + head
        return sub.view(1, subs, 1)
    head = torch.arange(part.heads).view(-1, 1, 1)
    if part.cut is Cut.HEAD_MAJOR:
        return head * subs + sub.view(1, subs, 1)
    dim = torch.arange(part.width // 2)
    keys = dim * subs + sub.view(subs, 1)
    values = len(dim) * subs + sub.view(subs, 1) * len(dim) + dim
    return head * (part.width * subs) + torch.cat((keys, values), 1)


def _own_layers(
    kv_caches: Mapping[str, LayerTensors], group: GroupSpec
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The layers of a group that have tensors of their own."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    seen: set[tuple[object, ...]] = set()
    for name, given in kv_caches.items():
        if name not in group.layers:
            continue
        row = (given,) if isinstance(given, torch.Tensor) else tuple(given)
        if not 1 <= len(row) <= MAX_TENSORS or not all(
            isinstance(each, torch.Tensor) for each in row
        ):
            raise _refused(name, f"it has {len(row)} tensors; 1 to {MAX_TENSORS} are known")
        # The memory tells who shares: vLLM names the layer that writes first.
        where = tuple((each.data_ptr(), *_like(each)) for each in row)
        if where not in seen:
            seen.add(where)
            found[name] = row
    return {name: _apart(name, row, group) for name, row in found.items()}


def _apart(name: str, row: tuple[torch.Tensor, ...], group: GroupSpec) -> tuple[torch.Tensor, ...]:
    """K and V of a tensor ``[2, blocks, ...]`` as two."""
    first = row[0]
    if group.layout.kind is Kind.STATE or len(row) > 1 or first.dim() != 5:
        return row
    if first.shape[0] != 2:
        raise _refused(
            name, f"shape {list(first.shape)}: dimension 0 is neither K and V, nor blocks"
        )
    return first[0], first[1]


def _like(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _part(
    name: str,
    tensor: torch.Tensor,
    role: int,
    index: int,
    group: GroupSpec,
    arrangement: str,
    num_blocks: int,
    tp_size: int,
) -> PartLayout:
    order = memory_order(tensor)
    if order is None:
        raise _refused(name, f"strides {list(tensor.stride())}: a page lies in pieces")
    rows = tensor.shape[0]
    if rows == 0 or rows % num_blocks:
        raise _refused(
            name, f"shape {list(tensor.shape)}: dimension 0 is not {num_blocks} blocks, or pages"
        )
    pages = rows // num_blocks
    block_size = group.layout.block_size
    if block_size % pages:
        raise _refused(name, f"{block_size} tokens can't be shared by {pages} pages of a block")
    tokens = block_size // pages
    total_heads = group.heads[name]
    cut, heads, width = Cut.OPAQUE, max(1, total_heads // tp_size), 0
    if group.layout.kind is not Kind.STATE:
        cut, heads, width = _inside(tensor, order, tokens, heads, arrangement)
    return PartLayout(
        group=index,
        role=role,
        layers=(name,),
        dtype=str(tensor.dtype),
        cut=cut,
        heads=heads,
        total_heads=total_heads,
        width=width,
        tokens=tokens,
        page_bytes=tensor[0].numel() * tensor.itemsize,
        pages_per_block=pages,
    )


def _inside(
    tensor: torch.Tensor, order: tuple[int, ...], tokens: int, heads: int, arrangement: str
) -> tuple[Cut, int, int]:
    """How a page lies in memory, its heads, and the elements of a token and head.

    Args:
        tensor: ``[rows, ...]``.
        order: The dimensions of a row, as they lie in memory.
        tokens: Tokens of a page.
        heads: Heads of this worker.
        arrangement: Attention backend and kernel.
    """
    inner = tuple(tensor.shape[1:])
    if arrangement.lower().startswith("cpu"):
        known = arrangement.lower().endswith(("/vec", "/vec16")) and tensor.itemsize > 1
        if known and inner[:2] == (heads, tokens) and len(inner) == 3 and inner[2] % 2 == 0:
            return Cut.K_TRANSPOSED, heads, inner[2]
        return Cut.OPAQUE, heads, 0
    if len(inner) == 3 and inner[:2] == (tokens, heads):
        if order == (1, 2, 3):
            # One head: both orders are the same, and heads can be told apart.
            return Cut.HEAD_MAJOR if heads == 1 else Cut.TOKEN_MAJOR, heads, inner[2]
        if order == (2, 1, 3):
            return Cut.HEAD_MAJOR, heads, inner[2]
    if len(inner) == 2 and inner[0] == tokens and order == (1, 2) and heads == 1:
        return Cut.HEAD_MAJOR, 1, inner[1]
    return Cut.OPAQUE, heads, 0


def _why_whole(
    parts: Sequence[PartLayout], columns: Sequence[Sequence[torch.Tensor]], arrangement: str
) -> str:
    for part, tensors in zip(parts, columns, strict=True):
        if part.tokens and part.cut is Cut.OPAQUE:
            return (
                f"how {arrangement} arranges {part.dtype} {list(tensors[0].shape)} inside a page"
                " is not known"
            )
        if part.tokens and tensors[0].stride(0) * tensors[0].itemsize != part.page_bytes:
            return "the pages of a layer lie apart, so finer units have no equal distances"
    return ""


def _caches(parts: Sequence[PartLayout], *, cut: bool) -> list[CacheLayout]:
    caches = [CacheLayout(at, WHOLE_PAGE, part.page_bytes, 1) for at, part in enumerate(parts)]
    for at, part in enumerate(parts):
        if not cut or not part.tokens:
            continue
        sizes = [] if part.cut is Cut.K_TRANSPOSED else [ONE_TOKEN]
        tokens = MIN_SUB_BLOCK
        while part.tokens % tokens == 0:
            sizes.append(tokens)
            tokens *= 2
        for size in sizes:
            units = unit_table(part, size).numel()
            caches.append(CacheLayout(at, size, part.page_bytes // units, units))
    return caches


def _units(tensor: torch.Tensor, cache: CacheLayout) -> torch.Tensor:
    pages = flat_rows(tensor.detach())
    if cache.tokens == WHOLE_PAGE:
        return pages
    return pages.view(tensor.shape[0] * cache.units_per_page, cache.unit_bytes)


def _refused(layer: str, reason: str) -> LLMException:
    return param_error(f"the KV of layer {layer!r} can't be served: {reason}")

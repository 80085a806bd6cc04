# SPDX-License-Identifier: Apache-2.0
"""Which units of which peer go into which units of ours: pure arithmetic over two layouts.

Block ids count blocks of one engine, whose workers all use the same. A request's tokens are cut
into sub-blocks that both block sizes are multiples of; a worker takes the heads that it has from
the workers of the other engine that have them, and its layers from the stages that have those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.layouts import (
    MIN_SUB_BLOCK,
    ONE_TOKEN,
    WHOLE_PAGE,
    Cut,
    GroupLayout,
    Kind,
    KVLayout,
    PartLayout,
    heads_of,
    unit_table,
)
from llm_datadist_torch.vllm.params import NULL_BLOCK, BlockIds


@dataclass(frozen=True)
class Move:
    """Rows of one cache of a peer for rows of one of ours.

    Attributes:
        src_cache: Index of the peer's cache.
        dst_cache: Index of ours.
        src_layers: Tensors read, as indices into the peer's part.
        dst_layers: Tensors written, as many.
        src_rows: int64 [n].
        dst_rows: int64 [n].
    """

    src_cache: int
    dst_cache: int
    src_layers: range
    dst_layers: range
    src_rows: torch.Tensor
    dst_rows: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a request are moved.

    Attributes:
        first: Tokens that are there already.
        stop: Tokens that are to be there then.
        partial: Whether the last block is moved if it is not full, and states are.
        rounded: Whether ``first`` is rounded down to whole blocks of each group; else it must be a
            multiple of all block sizes.
    """

    first: int
    stop: int
    partial: bool = True
    rounded: bool = False


# -- whether --------------------------------------------------------------------------------------


def refusal(local: KVLayout, remote: KVLayout) -> str | None:
    """Why nothing can be moved from a worker of ``remote`` to ``local``, in words; None if it can.

    It says the same of all workers of an engine.
    """
    if local.arrangement != remote.arrangement:
        return f"arrangement is {local.arrangement!r} here and {remote.arrangement!r} there"
    if [_meaning(group) for group in local.groups] != [_meaning(group) for group in remote.groups]:
        return f"the KV cache groups are {local.groups} here and {remote.groups} there"
    pairs = list(_pairs(local, remote))
    missing = _missing_layers(local, remote, pairs)
    if missing:
        return missing
    for mine, theirs, _ in pairs:
        reason = _part_refusal(local, remote, local.parts[mine], remote.parts[theirs])
        if reason:
            return reason
    return None


def _meaning(group: GroupLayout) -> tuple[Kind, int]:
    return group.kind, group.window


def _missing_layers(
    local: KVLayout, remote: KVLayout, pairs: Sequence[tuple[int, int, list[str]]]
) -> str | None:
    if local.pp_size > 1 and remote.pp_size > 1 and local.pp_size != remote.pp_size:
        return (
            f"pipeline parallel size is {local.pp_size} here and {remote.pp_size} there: one of"
            " them must be 1, or both equal"
        )
    # An engine in stages has the other layers in other workers.
    if remote.pp_size in (1, local.pp_size):
        unmoved = all_layers(local) - {(layer, at) for at, _, layers in pairs for layer in layers}
        if unmoved:
            return f"the layers are others: {min(unmoved)[0]!r} is here and not there"
    if local.pp_size in (1, remote.pp_size):
        unmoved = all_layers(remote) - {(layer, at) for _, at, layers in pairs for layer in layers}
        if unmoved:
            return f"the layers are others: {min(unmoved)[0]!r} is there and not here"
    return None


def _part_refusal(
    local: KVLayout, remote: KVLayout, mine: PartLayout, theirs: PartLayout
) -> str | None:
    if mine.dtype != theirs.dtype:
        return f"dtype is {mine.dtype!r} here and {theirs.dtype!r} there"
    if mine.total_heads != theirs.total_heads:
        return f"total_kv_heads is {mine.total_heads} here and {theirs.total_heads} there"
    if local.groups[mine.group].kind is Kind.STATE:
        return _state_refusal(local, remote, mine, theirs)
    if mine.width != theirs.width:
        return f"the caches of a layer have other widths, {mine.width} here, {theirs.width} there"
    if not _needs_cutting(mine, theirs):
        if mine.page_bytes != theirs.page_bytes:
            return f"pages have {mine.page_bytes} bytes here and {theirs.page_bytes} there"
        if mine.cut is Cut.OPAQUE and local.tp_size != remote.tp_size and mine.total_heads > 1:
            return (
                f"tensor parallel size is {local.tp_size} here and {remote.tp_size} there, but"
                f" {local.why_whole}"
            )
        return None
    other = (
        f"block_size {mine.tokens} here and {theirs.tokens} there, tensor parallel size"
        f" {local.tp_size} here and {remote.tp_size} there"
    )
    why_whole = local.why_whole or remote.why_whole
    if why_whole:
        return f"{other}: pages must be cut, but {why_whole}"
    if not _unit_tokens(mine, theirs):
        return f"{other}: both must be multiples of {MIN_SUB_BLOCK} tokens"
    return None


def _state_refusal(
    local: KVLayout, remote: KVLayout, mine: PartLayout, theirs: PartLayout
) -> str | None:
    if local.tp_size != remote.tp_size:
        return (
            f"tensor parallel size is {local.tp_size} here and {remote.tp_size} there: the states"
            " of recurrent layers can't be cut"
        )
    if mine.page_bytes != theirs.page_bytes:
        return f"states have {mine.page_bytes} bytes here and {theirs.page_bytes} there"
    return None


# -- who ------------------------------------------------------------------------------------------


def sources(local: KVLayout, remote_tp: int, remote_pp: int = 1) -> list[int]:
    """Workers of the other engine that ``local`` must ask, ascending: stage by stage, by rank.

    Each worker there is asked by at least one here, so that it learns when its blocks are not
    needed any more; for some there may be nothing to move (:func:`moves` is empty).

    Args:
        local: The worker that reads.
        remote_tp: Workers of a stage of the other engine.
        remote_pp: Its stages.

    Raises:
        LLMParamError: So many workers can't share the heads.
    """
    for total in {part.total_heads for part in local.parts}:
        if total % remote_tp and remote_tp % total:
            raise param_error(f"{total} KV heads can't be shared by {remote_tp} workers")
    ranks = _asked_by(local, local.tp_rank, remote_tp)
    return [
        stage * remote_tp + rank
        for stage in _stages(local, local.pp_rank, remote_pp)
        for rank in ranks
    ]


def readers(local: KVLayout, remote_tp: int, remote_worker: int, remote_pp: int = 1) -> int:
    """How many workers of this engine ask that worker of the other one."""
    stage, rank = divmod(remote_worker, remote_tp)
    ranks = sum(rank in _asked_by(local, each, remote_tp) for each in range(local.tp_size))
    stages = sum(stage in _stages(local, each, remote_pp) for each in range(local.pp_size))
    return ranks * stages


def _stages(local: KVLayout, pp_rank: int, remote_pp: int) -> list[int]:
    if remote_pp == local.pp_size:
        return [pp_rank]
    if local.pp_size == 1:
        return list(range(remote_pp))
    # One stage there has all layers. More stages that are unequal are refused when it is asked.
    return [0] if remote_pp == 1 else [pp_rank % remote_pp]


def _heads(total_heads: int, rank: int, tp_size: int, remote_tp: int) -> list[tuple[int, int]]:
    """(head, rank of the other engine to take it from) for each head of ``rank``."""
    pairs = []
    for head in heads_of(total_heads, rank, tp_size):
        ranks = [
            other for other in range(remote_tp) if head in heads_of(total_heads, other, remote_tp)
        ]
        # Where several have it, the workers here spread over them.
        pairs.append((head, ranks[rank % len(ranks)]))
    return pairs


def _asked_by(layout: KVLayout, rank: int, remote_tp: int) -> list[int]:
    """Ranks of the other engine that ``rank`` of this one asks."""
    totals = {part.total_heads for part in layout.parts}
    taken: list[set[int]] = [
        {source for total in totals for _, source in _heads(total, each, layout.tp_size, remote_tp)}
        for each in range(layout.tp_size)
    ]
    unread = sorted(set(range(remote_tp)).difference(*taken))
    return sorted(taken[rank].union(unread[rank :: layout.tp_size]))


# -- what -----------------------------------------------------------------------------------------


def moves(
    local: KVLayout,
    remote: KVLayout,
    local_blocks: BlockIds,
    remote_blocks: BlockIds,
    tokens: Tokens,
) -> list[Move]:
    """What to move from one worker.

    Where one of both sides has a null block nothing is moved: that side does not need it, or has
    nothing.

    Args:
        local: The worker that reads.
        remote: The worker that is read.
        local_blocks: The request's blocks here.
        remote_blocks: Its blocks there.
        tokens: Which; ``first`` is a whole number of blocks of each group. The last unit is moved
            as a whole.

    Raises:
        LLMParamError: The layouts don't fit, lists that are too short, or a block that the request
            needs and the peer has given up.
    """
    refused = refusal(local, remote)
    if refused:
        raise param_error(refused)
    for name, blocks in (("local_blocks", local_blocks), ("remote_blocks", remote_blocks)):
        if len(blocks) != len(local.groups):
            raise param_error(f"{name} of {len(blocks)} groups, but there are {len(local.groups)}")
    if tokens.first >= tokens.stop:
        return []
    found: list[Move] = []
    for mine, theirs, layers in _pairs(local, remote):
        rows = _rows(local, remote, mine, theirs, local_blocks, remote_blocks, tokens)
        if rows is None or not len(rows[2]):
            continue
        unit, src_rows, dst_rows = rows
        src_cache, dst_cache = _cache(remote, theirs, unit), _cache(local, mine, unit)
        for src, dst in _ranges(remote.parts[theirs].layers, local.parts[mine].layers, layers):
            found.append(Move(src_cache, dst_cache, src, dst, src_rows, dst_rows))
    return found


def layers_moved(local: KVLayout, remote: KVLayout) -> set[tuple[str, int]]:
    """(layer, index of our part) of all that a peer can give us."""
    return {(layer, mine) for mine, _, layers in _pairs(local, remote) for layer in layers}


def all_layers(local: KVLayout) -> set[tuple[str, int]]:
    """The same of all that we have."""
    return {(layer, at) for at, part in enumerate(local.parts) for layer in part.layers}


def _pairs(local: KVLayout, remote: KVLayout) -> Iterator[tuple[int, int, list[str]]]:
    """(our part, the peer's part, layers of both), for parts of one group and role."""
    for mine, part in enumerate(local.parts):
        for theirs, other in enumerate(remote.parts):
            if (part.group, part.role) == (other.group, other.role):
                there = set(other.layers)
                layers = [layer for layer in part.layers if layer in there]
                if layers:
                    yield mine, theirs, layers


def _cache(layout: KVLayout, part: int, tokens: int) -> int:
    return next(
        at for at, cache in enumerate(layout.caches) if (cache.part, cache.tokens) == (part, tokens)
    )


def _ranges(
    theirs: Sequence[str], mine: Sequence[str], layers: Sequence[str]
) -> Iterator[tuple[range, range]]:
    """Stretches of layers that follow each other at both ends."""
    src, dst = [theirs.index(each) for each in layers], [mine.index(each) for each in layers]
    start = 0
    for at in range(1, len(layers) + 1):
        goes_on = at < len(layers) and src[at] == src[at - 1] + 1 and dst[at] == dst[at - 1] + 1
        if not goes_on:
            yield range(src[start], src[at - 1] + 1), range(dst[start], dst[at - 1] + 1)
            start = at


def _rows(
    local: KVLayout,
    remote: KVLayout,
    mine: int,
    theirs: int,
    local_blocks: BlockIds,
    remote_blocks: BlockIds,
    tokens: Tokens,
) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """Tokens of the units, rows read and rows written; None if nothing comes from this peer."""
    part, other = local.parts[mine], remote.parts[theirs]
    group = local.groups[part.group]
    here, there = local_blocks[part.group], remote_blocks[part.group]
    heads = [
        head
        for head, rank in _heads(part.total_heads, local.tp_rank, local.tp_size, remote.tp_size)
        if rank == remote.tp_rank
    ]
    if not heads:
        return None
    if group.kind is Kind.STATE:
        return _state_rows(group, remote.groups[part.group], here, there, tokens)
    sides = [_Side(remote, theirs, there), _Side(local, mine, here)]
    for side in sides:
        side.check(tokens)
    unit = _unit_tokens(part, other) if _needs_cutting(part, other) else WHOLE_PAGE
    step = unit or part.tokens
    stop = tokens.stop if tokens.partial else tokens.stop - tokens.stop % group.block_size
    beyond = tokens.first % group.block_size
    if beyond and not tokens.rounded:
        raise param_error(
            f"first_token={tokens.first} is no multiple of block_size={group.block_size}"
        )
    starts = torch.arange((tokens.first - beyond) // step, -(-stop // step)) * step
    blocks = [side.blocks_at(starts) for side in sides]
    _check_given(group, tokens, starts, step, *blocks)
    kept = (blocks[0] != NULL_BLOCK) & (blocks[1] != NULL_BLOCK)
    starts = starts[kept]
    rows = [
        side.rows(starts, blocks_at[kept], unit, heads)
        for side, blocks_at in zip(sides, blocks, strict=True)
    ]
    return unit, rows[0], rows[1]


def _check_given(
    group: GroupLayout,
    tokens: Tokens,
    starts: torch.Tensor,
    step: int,
    there: torch.Tensor,
    here: torch.Tensor,
) -> None:
    """A window's blocks that the next token looks at must have been kept there."""
    if group.kind is not Kind.WINDOW or not tokens.partial:
        return
    first_needed = max(tokens.first, tokens.stop - group.window + 1)
    lost = (there == NULL_BLOCK) & (here != NULL_BLOCK) & (starts + step > first_needed)
    if bool(lost.any()):
        raise param_error(
            f"the peer has given up tokens from {int(starts[lost][0])} on, of which a window of"
            f" {group.window} tokens before token {tokens.stop} needs some"
        )


def _state_rows(
    group: GroupLayout,
    other: GroupLayout,
    here: Sequence[int],
    there: Sequence[int],
    tokens: Tokens,
) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    if not tokens.partial:
        return None
    src, dst = _state_block(there, other.spare_blocks), _state_block(here, group.spare_blocks)
    if src is None or dst is None:
        raise param_error(
            f"no block with a state: {list(there)[-4:]} there, {list(here)[-4:]} here"
        )
    return WHOLE_PAGE, _ids([src]), _ids([dst])


def _state_block(blocks: Sequence[int], spare: int) -> int | None:
    """The block that has the state: the last one but those for speculative tokens."""
    kept = blocks[: max(1, len(blocks) - spare)]
    return kept[-1] if kept and kept[-1] != NULL_BLOCK else None


@dataclass(frozen=True)
class _Side:
    """One end of a move of K and V."""

    layout: KVLayout
    at: int
    blocks: Sequence[int]

    @property
    def part(self) -> PartLayout:
        return self.layout.parts[self.at]

    @property
    def block_size(self) -> int:
        return self.part.tokens * self.part.pages_per_block

    def check(self, tokens: Tokens) -> None:
        if len(self.blocks) * self.block_size < tokens.stop:
            raise param_error(
                f"{len(self.blocks)} blocks of {self.block_size} tokens can't hold {tokens.stop}"
            )

    def blocks_at(self, starts: torch.Tensor) -> torch.Tensor:
        return _ids(self.blocks)[starts // self.block_size]

    def rows(
        self, starts: torch.Tensor, blocks: torch.Tensor, unit: int, heads: Sequence[int]
    ) -> torch.Tensor:
        """Rows of this end's cache with units of ``unit`` tokens, for the sub-blocks at starts."""
        part = self.part
        pages = blocks * part.pages_per_block + starts % self.block_size // part.tokens
        if unit == WHOLE_PAGE:
            return pages
        table = unit_table(part, unit)
        if part.cut is not Cut.TOKEN_MAJOR or unit == ONE_TOKEN:
            mine = heads_of(part.total_heads, self.layout.tp_rank, self.layout.tp_size)
            table = table[_ids([head - mine.start for head in heads])]
        # [sub-blocks of the request, heads, units]
        inside = table[:, starts % part.tokens // unit].transpose(0, 1)
        per_page = self.layout.caches[_cache(self.layout, self.at, unit)].units_per_page
        return (pages.view(-1, 1, 1) * per_page + inside).flatten()


def _needs_cutting(mine: PartLayout, theirs: PartLayout) -> bool:
    return mine.tokens != theirs.tokens or mine.heads != theirs.heads


def _unit_tokens(mine: PartLayout, theirs: PartLayout) -> int:
    """Tokens of the largest unit that both can have; 0 if there is none."""
    if mine.heads != theirs.heads and Cut.TOKEN_MAJOR in (mine.cut, theirs.cut):
        # The heads of a token lie side by side: they are moved one by one.
        both_can = Cut.K_TRANSPOSED not in (mine.cut, theirs.cut)
        return ONE_TOKEN if both_can else 0
    both = math.gcd(mine.tokens, theirs.tokens)
    unit = both & -both
    return unit if unit >= MIN_SUB_BLOCK else 0


def _ids(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)

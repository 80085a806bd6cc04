# SPDX-License-Identifier: Apache-2.0
"""Which units of which peer go into which units of ours: pure arithmetic over two layouts.

Block ids count blocks of one engine, whose workers all use the same. A request's tokens are cut
into sub-blocks that both block sizes are multiples of; a worker takes the heads that it has from
the workers of the other engine that have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.layouts import MIN_SUB_BLOCK, Cut, KVLayout, unit_table

Rows = tuple[torch.Tensor, torch.Tensor]
"""Rows read and rows written, both int64 [n], of one group that both ends have."""


def refusal(local: KVLayout, remote: KVLayout) -> str | None:
    """Why nothing can be moved from a worker of ``remote`` to ``local``, in words; None if it can.

    It says the same of all workers of an engine.
    """
    for name in ("arrangement", "dtype", "total_kv_heads", "layers"):
        mine, theirs = getattr(local, name), getattr(remote, name)
        if mine != theirs:
            return f"{name} is {mine!r} here and {theirs!r} there"
    if [part.width for part in local.parts] != [part.width for part in remote.parts]:
        return "the caches of a layer have other widths"
    if not _needs_cutting(local, remote):
        return None
    other = (
        f"block_size {local.block_size} here and {remote.block_size} there, tensor parallel size"
        f" {local.tp_size} here and {remote.tp_size} there"
    )
    why_whole = local.why_whole or remote.why_whole
    if why_whole:
        return f"{other}: pages must be cut, but {why_whole}"
    if len(local.heads) != len(remote.heads) and any(
        Cut.TOKEN_MAJOR in (mine.cut, theirs.cut)
        for mine, theirs in zip(local.parts, remote.parts, strict=True)
    ):
        return f"{other}: the heads must be told apart, but each token has them side by side"
    if _sub_block(local, remote) % MIN_SUB_BLOCK:
        return f"{other}: both must be multiples of {MIN_SUB_BLOCK} tokens"
    return None


def sources(local: KVLayout, remote_tp: int) -> list[int]:
    """Ranks of the other engine that ``local`` must ask, ascending.

    Each rank there is asked by at least one here, so that it learns when its blocks are not needed
    any more; for some there may be nothing to move (:func:`rows` is empty).

    Args:
        local: The worker that reads.
        remote_tp: Workers of the other engine.
    """
    return _asked_by(local, local.tp_rank, remote_tp)


def readers(local: KVLayout, remote_tp: int, remote_rank: int) -> int:
    """How many workers of this engine ask the worker ``remote_rank`` of the other one."""
    return sum(remote_rank in _asked_by(local, rank, remote_tp) for rank in range(local.tp_size))


def rows(
    local: KVLayout,
    remote: KVLayout,
    local_blocks: Sequence[int],
    remote_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> dict[int, Rows]:
    """What to pull from one worker: by group, rows of its blocks cache and rows of ours.

    Args:
        local: The worker that reads.
        remote: The worker that is read.
        local_blocks: The request's blocks here, in order from token 0 on.
        remote_blocks: Its blocks there, in order from token 0 on.
        first_token: Tokens that are here already; whole blocks.
        num_tokens: Tokens that are to be here then. The last unit is moved as a whole.

    Raises:
        LLMParamError: The layouts don't fit, or lists that are too short for ``num_tokens``.
    """
    refused = refusal(local, remote)
    if refused:
        raise param_error(refused)
    if first_token % local.block_size:
        raise param_error(
            f"first_token={first_token} is no multiple of block_size={local.block_size}"
        )
    for name, blocks, layout in (
        ("local_blocks", local_blocks, local),
        ("remote_blocks", remote_blocks, remote),
    ):
        if len(blocks) * layout.block_size < num_tokens:
            raise param_error(
                f"{len(blocks)} {name} of {layout.block_size} tokens can't hold {num_tokens}"
            )
    pairs = [
        pair for pair in _heads(local, local.tp_rank, remote.tp_size) if pair[1] == remote.tp_rank
    ]
    if not pairs or first_token >= num_tokens:
        return {}
    if not _needs_cutting(local, remote):
        at = slice(first_token // local.block_size, -(-num_tokens // local.block_size))
        pair = _ids(remote_blocks[at]), _ids(local_blocks[at])
        return dict.fromkeys(range(len(local.parts)), pair)
    return _cut_rows(
        local,
        remote,
        _ids(local_blocks),
        _ids(remote_blocks),
        range(first_token, num_tokens),
        _ids([head - local.heads.start for head, _ in pairs]),
        _ids([head - remote.heads.start for head, _ in pairs]),
    )


def _cut_rows(
    local: KVLayout,
    remote: KVLayout,
    local_blocks: torch.Tensor,
    remote_blocks: torch.Tensor,
    tokens: range,
    local_heads: torch.Tensor,
    remote_heads: torch.Tensor,
) -> dict[int, Rows]:
    """As :func:`rows`, in units that both have, head by head (pairs of equal index)."""
    unit = _sub_block(local, remote)
    starts = torch.arange(tokens.start // unit, -(-tokens.stop // unit)) * unit
    found: dict[int, Rows] = {}
    for at, group in enumerate(local.groups):
        if group.tokens != unit:
            continue
        sides = []
        for layout, blocks, heads in (
            (remote, remote_blocks, remote_heads),
            (local, local_blocks, local_heads),
        ):
            table = unit_table(layout.parts[group.part], layout.block_size, unit)
            if layout.parts[group.part].cut is not Cut.TOKEN_MAJOR:
                table = table[heads]
            # [sub-blocks of the request, heads, units]
            inside = table[:, starts % layout.block_size // unit].transpose(0, 1)
            block = blocks[starts // layout.block_size].view(-1, 1, 1)
            per_block = layout.groups[at].units_per_block
            sides.append((block * per_block + inside).flatten())
        found[at] = sides[0], sides[1]
    return found


def _needs_cutting(local: KVLayout, remote: KVLayout) -> bool:
    return local.block_size != remote.block_size or len(local.heads) != len(remote.heads)


def _sub_block(local: KVLayout, remote: KVLayout) -> int:
    """Tokens of the largest unit that both can have: the power of two in both block sizes."""
    both = math.gcd(local.block_size, remote.block_size)
    return both & -both


def _heads(layout: KVLayout, rank: int, remote_tp: int) -> list[tuple[int, int]]:
    """(head, rank of the other engine to take it from) for each head of ``rank``."""
    pairs = []
    for head in layout.heads_of(rank, layout.tp_size):
        ranks = [other for other in range(remote_tp) if head in layout.heads_of(other, remote_tp)]
        # Where several have it, the workers here spread over them.
        pairs.append((head, ranks[rank % len(ranks)]))
    return pairs


def _asked_by(layout: KVLayout, rank: int, remote_tp: int) -> list[int]:
    """Ranks of the other engine that ``rank`` of this one asks."""
    taken = [
        {source for _, source in _heads(layout, each, remote_tp)} for each in range(layout.tp_size)
    ]
    unread = sorted(set(range(remote_tp)).difference(*taken))
    return sorted(taken[rank].union(unread[rank :: layout.tp_size]))


def _ids(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)

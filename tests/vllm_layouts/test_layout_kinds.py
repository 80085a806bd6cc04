# SPDX-License-Identifier: Apache-2.0
"""The layouts of vllm-ascend and of hybrid models, on synthetic tensors: bytes between equal ends,
other block sizes and heads where pages can be cut, and stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from llm_datadist_torch.vllm import mapping
from llm_datadist_torch.vllm.layouts import (
    Cut,
    GroupLayout,
    GroupSpec,
    Kind,
    KVLayout,
    describe,
)

BLOCKS, TOKENS = 6, 128


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randint(-100, 100, shape).to(dtype)


def attention(*layers: str, heads: int = 2, block: int = TOKENS) -> GroupSpec:
    return GroupSpec(GroupLayout(Kind.ATTENTION, block), layers, dict.fromkeys(layers, heads))


def window(*layers: str, size: int, heads: int = 2) -> GroupSpec:
    return GroupSpec(GroupLayout(Kind.WINDOW, TOKENS, size), layers, dict.fromkeys(layers, heads))


def states(*layers: str, spare: int = 0) -> GroupSpec:
    layout = GroupLayout(Kind.STATE, 0, spare_blocks=spare)
    return GroupSpec(layout, layers, dict.fromkeys(layers, 1))


def dense() -> Any:
    """K and V per layer; vllm-ascend cuts them out of larger allocations."""
    raw = random(1000 + 2 * BLOCKS * TOKENS * 2 * 8)
    pair = raw[1000:].view(2, BLOCKS, TOKENS, 2, 8)
    kv = {"a": (pair[0], pair[1]), "b": tuple(random(BLOCKS, TOKENS, 2, 8) for _ in "kv")}
    return kv, [attention("a", "b")], [Cut.TOKEN_MAJOR] * 2


def sparse_mla_c8() -> Any:
    """k, v, index k and the index's scale; and a layer without an index."""
    kv = {
        "a": (
            random(BLOCKS, TOKENS, 1, 16),
            random(BLOCKS, TOKENS, 1, 8),
            random(BLOCKS, TOKENS, 1, 4, dtype=torch.int8),
            random(BLOCKS, TOKENS, 1),
        ),
        "b": (random(BLOCKS, TOKENS, 1, 16), random(BLOCKS, TOKENS, 1, 8)),
    }
    return kv, [attention("a", "b", heads=1)], [Cut.HEAD_MAJOR] * 4


def index_cache() -> Any:
    """The index is a layer of its own, of one tensor or two."""
    kv = {
        "l0.attn": (random(BLOCKS, TOKENS, 1, 16), random(BLOCKS, TOKENS, 1, 8)),
        "l0.attn.index_cache": (random(BLOCKS, TOKENS, 1, 4),),
        "l1.attn": (random(BLOCKS, TOKENS, 1, 16), random(BLOCKS, TOKENS, 1, 8)),
        "l1.attn.index_cache": (
            random(BLOCKS, TOKENS, 1, 4, dtype=torch.int8),
            random(BLOCKS, TOKENS, 1),
        ),
    }
    return kv, [attention(*kv, heads=1)], [Cut.HEAD_MAJOR] * 5


def quantised() -> Any:
    """C8: the dtype differs by layer, and scales lie beside."""
    kv = {
        "a": tuple(random(BLOCKS, TOKENS, 2, 8, dtype=torch.int8) for _ in "kv"),
        "b": tuple(random(BLOCKS, TOKENS, 2, 8) for _ in "kv"),
        "a.scale": (random(BLOCKS, TOKENS, 2, 1, dtype=torch.float32),),
    }
    return kv, [attention(*kv)], [Cut.TOKEN_MAJOR] * 5


def kernel_blocks() -> Any:
    """The engine's blocks have 512 tokens, the kernel's 128."""
    kv = {"a": tuple(random(4 * BLOCKS, TOKENS, 2, 8) for _ in "kv")}
    return kv, [attention("a", block=4 * TOKENS)], [Cut.TOKEN_MAJOR] * 2


def strided_views() -> Any:
    """Layers of several groups are strided views of one raw tensor, under other block tables."""
    raw = random(BLOCKS, 3, TOKENS * 16)
    kv = {
        "full": raw[:, 0].view(BLOCKS, TOKENS, 1, 16),
        "sliding": raw[:, 0].view(BLOCKS, TOKENS, 1, 16),
        "index": raw[:, 2, : TOKENS * 4].view(BLOCKS, TOKENS, 4),
    }
    groups = [attention("full", "index", heads=1), window("sliding", size=100, heads=1)]
    return kv, groups, [Cut.HEAD_MAJOR] * 3


def three_dimensions() -> Any:
    """An index cache without a dimension of heads, and hidden states."""
    kv = {"a": random(BLOCKS, TOKENS, 24), "hidden": random(BLOCKS, TOKENS, 7)}
    return kv, [attention(*kv, heads=1)], [Cut.HEAD_MAJOR] * 2


def mamba_hybrid() -> Any:
    """[conv, ssm] of one page, K and V of another with padding; each kind is a group."""
    page = 4096
    raw = random(2, BLOCKS, page, dtype=torch.int8)
    conv = raw[0][:, : 4 * 96].view(BLOCKS, 4, 96)
    ssm = raw[0][:, 512 : 512 + 4 * 2 * 8 * 16].view(torch.float32).view(BLOCKS, 2, 8, 16)
    keys = raw[1][:, :1024].view(torch.float16).view(BLOCKS, 16, 2, 16)
    values = raw[1][:, 1024:2048].view(torch.float16).view(BLOCKS, 16, 2, 16)
    for view in (ssm, keys, values):
        # Random bytes would be no numbers here and there.
        view.copy_(random(*view.shape, dtype=view.dtype))
    kv = {"m": [conv, ssm], "a": (keys, values)}
    groups = [states("m"), attention("a", block=16)]
    return kv, groups, [Cut.OPAQUE] * 2 + [Cut.TOKEN_MAJOR] * 2


def gated_delta() -> Any:
    """A conv state whose dimensions lie in memory the other way round, and spare blocks."""
    conv = random(BLOCKS, 3, 40).transpose(1, 2)
    kv = {"m": [conv, random(BLOCKS, 2, 8, 8, dtype=torch.float32)]}
    return kv, [states("m", spare=2)], [Cut.OPAQUE] * 2


def fractal_nz() -> Any:
    """310P: [2, blocks, heads * dim / 16, tokens, 16]."""
    return {"a": random(2, BLOCKS, 4, TOKENS, 16)}, [attention("a")], [Cut.OPAQUE] * 2


def heads_first() -> Any:
    """A view with the heads before the tokens in memory."""
    kv = {"a": tuple(random(BLOCKS, 2, TOKENS, 8).transpose(1, 2) for _ in "kv")}
    return kv, [attention("a")], [Cut.HEAD_MAJOR] * 2


KINDS: list[Callable[[], Any]] = [
    dense,
    sparse_mla_c8,
    index_cache,
    quantised,
    kernel_blocks,
    strided_views,
    three_dimensions,
    mamba_hybrid,
    gated_delta,
    fractal_nz,
    heads_first,
]


@dataclass
class Side:
    kv: Any
    groups: list[GroupSpec]
    layout: KVLayout
    views: list[list[torch.Tensor]]


def side(made: Any, **where: int) -> Side:
    kv, groups, _ = made
    layout, views = describe(kv, groups, arrangement="ascend", num_blocks=BLOCKS, **where)
    return Side(kv, groups, layout, views)


def tensors_of(given: Any) -> list[torch.Tensor]:
    tensors = [given] if isinstance(given, torch.Tensor) else list(given)
    return list(tensors[0]) if tensors[0].dim() == 5 else tensors


def copy_rows(dst: Side, src: Side, found: list[mapping.Move]) -> None:
    for move in found:
        for source, target in zip(move.src_layers, move.dst_layers, strict=True):
            rows = src.views[move.src_cache][source][move.src_rows]
            dst.views[move.dst_cache][target][move.dst_rows] = rows


def request(layout: KVLayout, first: int) -> tuple[tuple[int, ...], ...]:
    """Blocks of a request of two blocks in each group; a window has given up the first."""
    blocks = []
    for at, group in enumerate(layout.groups):
        pair = first + at, first + at + 2
        if group.kind is Kind.STATE:
            blocks.append((pair[0], *(5,) * group.spare_blocks))
        elif group.kind is Kind.WINDOW:
            blocks.append((0, pair[1]))
        else:
            blocks.append(pair)
    return tuple(blocks)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bytes_between_equal_ends(kind: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    made = kind()
    src, dst = side(made), side(kind())
    assert [part.cut for part in src.layout.parts] == made[2]
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(src.layout), type=KVLayout)
    assert mapping.refusal(dst.layout, told) is None
    there, here = request(src.layout, 1), request(dst.layout, 2)
    before = {
        name: [tensor.clone() for tensor in tensors_of(given)] for name, given in dst.kv.items()
    }
    block = max(group.layout.block_size for group in src.groups) or 16
    copy_rows(dst, src, mapping.moves(dst.layout, told, here, there, mapping.Tokens(0, 2 * block)))
    moved = {name: set() for name in dst.kv}
    for at, group in enumerate(dst.groups):
        spare = group.layout.spare_blocks
        pairs = [
            pair
            for pair in zip(
                there[at][: len(there[at]) - spare], here[at][: len(here[at]) - spare], strict=True
            )
            if 0 not in pair
        ]
        assert pairs
        for name in group.layers:
            sides = zip(tensors_of(dst.kv[name]), tensors_of(src.kv[name]), strict=True)
            for mine, theirs in sides:
                pages = mine.shape[0] // BLOCKS
                for a, b in pairs:
                    moved[name].add(b)
                    for page in range(pages):
                        assert torch.equal(mine[b * pages + page], theirs[a * pages + page])
    shared = set().union(*moved.values()) if kind is strided_views else None
    for name, tensors in before.items():
        for old, new in zip(tensors, tensors_of(dst.kv[name]), strict=True):
            pages = new.shape[0] // BLOCKS
            for block_id in set(range(BLOCKS)) - (shared or moved[name]):
                rows = slice(block_id * pages, (block_id + 1) * pages)
                assert torch.equal(old[rows], new[rows]), "another block was written"


@pytest.mark.parametrize("kind", [fractal_nz, mamba_hybrid, gated_delta])
def test_what_can_not_be_cut_is_refused_between_unequal_ends(kind: Callable[[], Any]) -> None:
    one, two = side(kind()).layout, side(kind(), tp_size=2).layout
    refused = mapping.refusal(one, two)
    assert refused is not None
    assert "tensor parallel size" in refused


def test_other_kernel_blocks() -> None:
    """512 tokens as four kernel blocks there, and as one block here."""
    torch.manual_seed(2)
    src = side(kernel_blocks())
    groups = [attention("a", block=4 * TOKENS)]
    dst = side(({"a": tuple(random(BLOCKS, 4 * TOKENS, 2, 8) for _ in "kv")}, groups, []))
    tokens = mapping.Tokens(0, 700)
    copy_rows(dst, src, mapping.moves(dst.layout, src.layout, ((3, 1),), ((2, 4),), tokens))
    for mine, theirs in zip(dst.kv["a"], src.kv["a"], strict=True):
        assert torch.equal(mine[3], theirs[8:12].reshape(512, 2, 8))
        assert torch.equal(mine[1, :188], theirs[16:20].reshape(512, 2, 8)[:188])


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 2), (2, 1), (4, 2)])
def test_heads_side_by_side(src_tp: int, dst_tp: int) -> None:
    """Grouped-query attention on the token-major layout, more and fewer workers at the prefill."""
    torch.manual_seed(3)
    heads = 4
    whole = {name: [random(BLOCKS, TOKENS, heads, 8) for _ in "kv"] for name in "ab"}

    def workers(count: int, *, filled: bool) -> list[Side]:
        found = []
        for rank in range(count):
            mine = slice(rank * heads // count, (rank + 1) * heads // count)
            kv = {
                name: tuple(
                    each[:, :, mine].clone() if filled else torch.zeros_like(each[:, :, mine])
                    for each in pair
                )
                for name, pair in whole.items()
            }
            kv = {name: tuple(each.contiguous() for each in pair) for name, pair in kv.items()}
            made = kv, [attention("a", "b", heads=heads)], []
            found.append(side(made, tp_rank=rank, tp_size=count))
        return found

    theirs, ours = workers(src_tp, filled=True), workers(dst_tp, filled=False)
    for rank, worker in enumerate(ours):
        for source in mapping.sources(worker.layout, src_tp):
            tokens = mapping.Tokens(0, 2 * TOKENS)
            remote = theirs[source]
            copy_rows(
                worker,
                remote,
                mapping.moves(worker.layout, remote.layout, ((3, 5),), ((1, 4),), tokens),
            )
        mine = slice(rank * heads // dst_tp, (rank + 1) * heads // dst_tp)
        for name, pair in whole.items():
            for got, right in zip(worker.kv[name], pair, strict=True):
                assert torch.equal(got[[3, 5]], right[[1, 4]][:, :, mine])
                assert not got[[0, 1, 2, 4]].any()


def stages(count: int) -> list[Side]:
    """Four layers shared by so many stages."""
    names = [f"l{at}" for at in range(4)]
    found = []
    for stage in range(count):
        mine = names[stage * 4 // count : (stage + 1) * 4 // count]
        kv = {name: tuple(random(BLOCKS, TOKENS, 2, 8) for _ in "kv") for name in mine}
        made = kv, [attention(*names)], []
        found.append(side(made, pp_rank=stage, pp_size=count))
    return found


@pytest.mark.parametrize(("src_pp", "dst_pp"), [(2, 1), (1, 2), (2, 2)])
def test_layers_of_stages(src_pp: int, dst_pp: int) -> None:
    torch.manual_seed(4)
    theirs, ours = stages(src_pp), stages(dst_pp)
    for worker in ours:
        moved = set()
        for source in mapping.sources(worker.layout, 1, src_pp):
            remote = theirs[source]
            tokens = mapping.Tokens(0, TOKENS)
            copy_rows(
                worker,
                remote,
                mapping.moves(worker.layout, remote.layout, ((3,),), ((1,),), tokens),
            )
            moved |= mapping.layers_moved(worker.layout, remote.layout)
        assert moved == mapping.all_layers(worker.layout)
    right = {name: pair for worker in theirs for name, pair in worker.kv.items()}
    for worker in ours:
        for name, pair in worker.kv.items():
            for got, sent in zip(pair, right[name], strict=True):
                assert torch.equal(got[3], sent[1])
    for worker in range(src_pp):
        asked = sum(mapping.sources(each.layout, 1, src_pp).count(worker) for each in ours)
        assert mapping.readers(ours[0].layout, 1, worker, src_pp) == asked >= 1


def test_stages_that_do_not_fit() -> None:
    refused = mapping.refusal(stages(2)[0].layout, stages(4)[0].layout)
    assert refused is not None
    assert "pipeline parallel size is 2 here and 4 there" in refused


def test_a_state_is_moved_at_the_end_only() -> None:
    src, dst = side(gated_delta()), side(gated_delta())
    blocks = ((1, 5, 5),)
    part = mapping.Tokens(0, 100, partial=False)
    assert not mapping.moves(dst.layout, src.layout, blocks, blocks, part)
    assert mapping.moves(dst.layout, src.layout, blocks, blocks, mapping.Tokens(0, 100))
    with pytest.raises(ValueError, match="no block with a state"):
        mapping.moves(dst.layout, src.layout, blocks, ((0, 0, 5),), mapping.Tokens(0, 100))

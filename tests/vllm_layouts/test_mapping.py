# SPDX-License-Identifier: Apache-2.0
"""Other block sizes and tensor parallel sizes, against writing the KV token by token."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMParamError,
)
from llm_datadist_torch.vllm import mapping
from llm_datadist_torch.vllm.layouts import KVLayout
from tests.vllm_layouts.layout_cases import (
    ASCEND,
    CPU,
    CPU_AMX,
    KINDS,
    MLA,
    SPARSE_MLA,
    Kind,
    Worker,
    slots,
)

BLOCKS = 7


def moves(
    local: KVLayout,
    remote: KVLayout,
    local_blocks: list[int],
    remote_blocks: list[int],
    first: int,
    stop: int,
) -> list[mapping.Move]:
    blocks = ((tuple(each),) for each in (local_blocks, remote_blocks))
    return mapping.moves(local, remote, *blocks, mapping.Tokens(first, stop))


def copy_rows(dst: Worker, src: Worker, found: list[mapping.Move]) -> None:
    """What pull_blocks does, row by row."""
    for move in found:
        assert len(set(move.dst_rows.tolist())) == len(move.dst_rows), "no row is written twice"
        for source, target in zip(move.src_layers, move.dst_layers, strict=True):
            rows = src.views[move.src_cache][source][move.src_rows]
            dst.views[move.dst_cache][target][move.dst_rows] = rows


def check_holds(worker: Worker, blocks: list[int], first: int, num_tokens: int) -> None:
    tokens = range(first, num_tokens)
    for token, slot in zip(tokens, slots(blocks, worker.block_size, tokens), strict=True):
        assert worker.has_token(slot, token), (token, slot)
    for block in set(range(BLOCKS)) - set(blocks[first // worker.block_size :]):
        for at in range(worker.block_size):
            assert worker.is_untouched((block, at))


@st.composite
def requests(draw):
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    sizes = [draw(st.sampled_from([16, 32, 48, 64])) for _ in range(2)]
    tp_sizes = [draw(st.sampled_from([1, 2, 4, 8])) for _ in range(2)]
    num_tokens = draw(st.integers(1, 3 * min(sizes)))
    first = draw(st.integers(0, num_tokens // sizes[1])) * sizes[1]
    lists = [
        draw(st.permutations(range(1, BLOCKS))).copy()[: -(-num_tokens // size)] for size in sizes
    ]
    return kind, sizes, tp_sizes, num_tokens, first, lists


@settings(max_examples=25, deadline=None)
@given(requests())
def test_every_worker_gets_its_heads_of_every_token(case):
    kind, sizes, tp_sizes, num_tokens, first, (src_blocks, dst_blocks) = case
    theirs, ours = (
        [Worker(kind, BLOCKS, size, rank, tp) for rank in range(tp)]
        for size, tp in zip(sizes, tp_sizes, strict=True)
    )
    for worker in theirs:
        everywhere = range(len(src_blocks) * sizes[0])
        for token, slot in zip(everywhere, slots(src_blocks, sizes[0], everywhere), strict=True):
            worker.write(slot, token)
    asked = []
    for worker in ours:
        ranks = mapping.sources(worker.layout, tp_sizes[0])
        asked += ranks
        for rank in ranks:
            assert mapping.refusal(worker.layout, theirs[rank].layout) is None
            args = worker.layout, theirs[rank].layout, dst_blocks, src_blocks
            copy_rows(worker, theirs[rank], moves(*args, first, num_tokens))
        check_holds(worker, dst_blocks, first, num_tokens)
    for rank in range(tp_sizes[0]):
        assert mapping.readers(ours[0].layout, tp_sizes[0], rank) == asked.count(rank) >= 1


@pytest.mark.parametrize(
    ("kind", "src", "dst"),
    [
        (CPU, (128, 1), (256, 1)),
        (CPU, (256, 1), (128, 1)),
        (CPU, (32, 2), (32, 1)),
        (CPU, (32, 1), (64, 2)),
        (CPU, (64, 4), (32, 8)),
        (ASCEND, (32, 2), (64, 2)),
        (ASCEND, (32, 1), (64, 2)),
        (ASCEND, (32, 4), (32, 2)),
        (MLA, (32, 4), (32, 1)),
        (SPARSE_MLA, (64, 1), (32, 2)),
    ],
    ids=str,
)
def test_real_bytes_between_instances(instance_factory, kind, src, dst):
    """The same by pull_blocks, from as many instances as there are workers."""
    num_tokens, (size, tp) = 150, src
    theirs = [Worker(kind, BLOCKS, size, rank, tp) for rank in range(tp)]
    ours = [Worker(kind, BLOCKS, dst[0], rank, dst[1]) for rank in range(dst[1])]
    src_blocks = [5, 6, 3, 4, 2][: -(-num_tokens // size)]
    dst_blocks = [1, 4, 6, 5, 3][: -(-num_tokens // dst[0])]
    for worker in theirs:
        for token, slot in zip(
            range(num_tokens), slots(src_blocks, size, range(num_tokens)), strict=True
        ):
            worker.write(slot, token)
    owners = [instance_factory(remote=True) for _ in theirs]
    for worker, owner in zip(theirs, owners, strict=True):
        register(owner, worker)
    for worker in ours:
        puller = instance_factory(remote=True)
        caches = register(puller, worker)
        for rank in mapping.sources(worker.layout, tp):
            link(puller, owners[rank])
            # As it comes from the peer.
            told = msgspec.msgpack.encode(theirs[rank].layout)
            layout = msgspec.msgpack.decode(told, type=KVLayout)
            assert layout == theirs[rank].layout
            for move in moves(worker.layout, layout, dst_blocks, src_blocks, 0, num_tokens):
                puller.cache_manager.pull_blocks(
                    BlocksCacheKey(owners[rank].cluster_id, move.src_cache),
                    caches[move.dst_cache],
                    move.src_rows,
                    move.dst_rows,
                    src_layer_range=move.src_layers,
                    dst_layer_range=move.dst_layers,
                    tensor_num_per_layer=1,
                )
        check_holds(worker, dst_blocks, 0, num_tokens)


def register(datadist: LLMDataDist, worker: Worker) -> list:
    return [
        datadist.cache_manager.register_blocks_cache(
            CacheDesc(len(tensors), list(tensors[0].shape), DataType.DT_UINT8),
            tensors,
            BlocksCacheKey(datadist.cluster_id, group),
            remote_accessible=True,
        )
        for group, tensors in enumerate(worker.views)
    ]


def link(puller: LLMDataDist, owner: LLMDataDist) -> None:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = owner.cluster_id
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info(*owner.listen_address)
    puller.link_clusters([cluster])


def changed(kind: Kind, **fields: object) -> Kind:
    return dataclasses.replace(kind, **fields)


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        ((CPU, 32, 1), (changed(CPU, arrangement="cpu/amx"), 32, 1), "arrangement is 'cpu/vec'"),
        ((CPU_AMX, 32, 1), (CPU_AMX, 64, 1), "how cpu/amx arranges torch.float32 .* is not known"),
        ((CPU_AMX, 32, 1), (CPU_AMX, 32, 2), "tensor parallel size 1 here and 2 there"),
        ((CPU, 32, 1), (CPU, 40, 1), "multiples of 16 tokens"),
        ((CPU, 32, 1), (changed(CPU, heads=2), 32, 1), "total_kv_heads is 4 here and 2 there"),
        ((CPU, 32, 1), (changed(CPU, widths=(6,)), 32, 1), "other widths"),
        ((MLA, 32, 1), (SPARSE_MLA, 32, 1), "'model.layers.0' is there and not here"),
    ],
)
def test_refused_with_the_reason(mine, theirs, reason):
    local, remote = (Worker(kind, BLOCKS, size, 0, tp) for kind, size, tp in (mine, theirs))
    with pytest.raises(LLMParamError, match=reason):
        moves(local.layout, remote.layout, [1], [1], 0, 1)


def test_whole_pages_of_what_is_not_known_inside():
    src, dst = Worker(CPU_AMX, BLOCKS, 32), Worker(CPU_AMX, BLOCKS, 32)
    for tensors in src.tensors:
        tensors[0].random_(1, 100)
    found = moves(dst.layout, src.layout, [3, 1], [6, 5], 0, 40)
    assert [move.dst_cache for move in found] == [0]
    copy_rows(dst, src, found)
    for mine, theirs in zip(dst.tensors, src.tensors, strict=True):
        assert torch.equal(mine[0][[3, 1]], theirs[0][[6, 5]])


def test_lists_that_do_not_fit():
    local, remote = Worker(CPU, BLOCKS, 32).layout, Worker(CPU, BLOCKS, 64).layout
    for args, reason in (
        (([1], [1], 0, 33), "1 blocks of 32 tokens can't hold 33"),
        (([3, 1, 2], [1], 0, 65), "1 blocks of 64 tokens can't hold 65"),
        (([2, 1], [1], 16, 33), "first_token=16 is no multiple"),
    ):
        with pytest.raises(LLMParamError, match=reason):
            moves(local, remote, *args)
    assert not moves(local, remote, [2, 1], [1], 64, 64)


def test_workers_spread_over_those_that_have_the_same():
    ours = [Worker(MLA, BLOCKS, 32, rank, 4).layout for rank in range(4)]
    assert [mapping.sources(layout, 4) for layout in ours] == [[0], [1], [2], [3]]
    assert [mapping.sources(layout, 2) for layout in ours] == [[0], [1], [0], [1]]

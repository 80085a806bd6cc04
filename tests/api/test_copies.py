# SPDX-License-Identifier: Apache-2.0
"""copy_cache, copy_blocks, swap_blocks: order of checks, and every byte (reference API, 9.2)."""

from __future__ import annotations

import pytest
import torch

from llm_datadist_torch import Cache, CacheDesc, DataType
from llm_datadist_torch.values.enums import Placement
from tests import reference
from tests.api.support import (
    KNE,
    PI,
    desc,
    host,
    ids,
    raises,
    raw,
    scramble,
    tensors_of,
)

# Texts are evaluated with the World's attributes as names.
COPY_CACHE = [
    # 1 types
    ("None, con", TypeError),
    ("con, None", TypeError),
    ("1, con", TypeError),
    ("con, 'x', -1", TypeError),
    # 2 uint32, 3 uint64, 4 int64
    ("blk, blk, -1", ValueError),
    ("con, con, 2**32", ValueError),
    ("con, con, 0, -1", ValueError),
    ("con, con, 0, 2**32", ValueError),
    ("con, con, None", TypeError),
    ("con, con, 0, '0'", TypeError),
    ("blk, blk, 0, 0, -1", ValueError),
    ("con, con, 0, 0, 2**64", ValueError),
    ("con, con, 0, 0, 0.0", TypeError),
    ("blk, blk, 0, 0, 0, 2**63", ValueError),
    ("con, con, 0, 0, 0, None", TypeError),
    # 5 contiguous
    ("con, blk, 0, 0, 0, 0", PI),
    ("blk, con, 0, 0, 0, 0", PI),
    ("bgone, gone", PI),
    # 6 size
    ("gone, gone, 0, 0, 0, 0", PI),
    ("gone, gone, 0, 0, 0, -2", PI),
    ("con, con, 0, 0, 0, 0, 'x'", PI),
    # 7 req_id
    ("gone, gone, 0, 0, 0, -1, 'x'", TypeError),
    ("gone, gone, 0, 0, 0, -1, -1", ValueError),
    ("gone, gone, 0, 0, 0, -1, 2**64", ValueError),
    # 8 ids
    ("con, gone, 99", KNE),
    ("gone, con, 99", KNE),
    ("con, yours, 99", KNE),
    ("yours, con, 99", KNE),
    # 9 numbers
    ("con, con3", PI),
    ("con3, con", PI),
    ("con, con, 4", PI),
    ("con, con, 0, 4", PI),
    ("con, con, 2**32 - 1", PI),
    ("con, con, 0, 2**32 - 1", PI),
    ("con, con, 0, 1, 32", PI),
    ("con, con, 0, 1, 2**64 - 1", PI),
    ("con, con, 0, 1, 33, 1", PI),
    ("con, con, 0, 1, 0, 33", PI),
    ("con, con, 0, 1, 1, 32", PI),
    ("con, con, 0, 1, 0, 2**63 - 1", PI),
    ("con, con, 0, 1, 2**64 - 1, 2**63 - 1", PI),
    ("con2, con", PI),  # 32 bytes do not fit 16
    ("con2, con, 0, 0, 16, 1", PI),
    ("con, con2, 0, 0, 16, 1", PI),
    ("con, con2, 0, 3", PI),
    ("con, dim1", PI),  # 14.18
    ("dim1, con", PI),
]

COPY_BLOCKS = [
    ("None, {}", TypeError),
    ("1, {}", TypeError),
    ("con, None", TypeError),
    ("con, []", TypeError),
    ("con, {'0': [1]}", TypeError),
    ("con, {0: (1,)}", TypeError),
    ("con, {0: 1}", TypeError),
    ("con, {0: None}", TypeError),
    ("con, {0: ['1']}", TypeError),
    ("con, {0: [1.0]}", TypeError),
    ("blk, torch.zeros(2, 2)", TypeError),
    ("blk, torch.zeros(2, 3, dtype=torch.int64)", TypeError),
    ("blk, torch.zeros(4, dtype=torch.int64)", TypeError),
    ("blk, torch.zeros(2, 2, dtype=torch.int32)", TypeError),
    # bool is no block (the reference takes it as 0 or 1)
    ("blk, {True: [0]}", TypeError),
    ("blk, {0: [True]}", TypeError),
    ("blk, {0: [2**63]}", ValueError),
    ("blk, {2**64: [1]}", ValueError),
    ("con, {9: [9]}", PI),
    ("con, {}", PI),
    ("bgone, {9: [9]}", KNE),
    ("bgone, {}", KNE),
    ("yblk, {0: [1]}", KNE),
    ("cpu, {0: [1]}", KNE),
    ("blk, {0: [1, 4]}", PI),
    ("blk, {4: [1]}", PI),
    ("blk, {0: [1], -1: [2]}", PI),
    ("blk, {0: [1, -1]}", PI),
    ("blk, {0: [2**63 - 1]}", PI),
    ("blk, {0: [1, 1]}", PI),
    ("blk, {0: [1], 2: [1]}", PI),
    ("blk, ids((0, 1), (2, 1))", PI),
    ("blk, ids((0, 1), (0, 4))", PI),
    ("bdim1, {0: [1]}", PI),
]

SWAP_BLOCKS = [
    ("None, hblk, {}", AttributeError),
    ("blk, None, {}", AttributeError),
    ("blk, hblk, None", AttributeError),
    ("1, hblk, {}", TypeError),
    ("blk, 1, {}", TypeError),
    ("con, hblk, None", PI),
    ("blk, hcon, []", PI),
    ("blk, hblk3, []", TypeError),
    ("blk, hblk3, {'0': 1}", TypeError),
    ("blk, hblk, {0: '1'}", TypeError),
    ("blk, hblk, {0: [1]}", TypeError),
    ("blk, hblk, {0: 1.0}", TypeError),
    ("blk, hblk, torch.zeros(2, 2)", TypeError),
    ("blk, hblk, {True: 0}", TypeError),
    ("blk, hblk, {0: 2**64}", ValueError),
    ("blk, hwide, {0: 0}", PI),
    ("blk, hblk3, {0: 0}", PI),
    ("bdim1, hblk, {0: 0}", PI),
    ("blk, hblk, {4: 0}", PI),
    ("blk, hblk, {0: 4}", PI),
    ("blk, hblk, {0: 1, -1: 0}", PI),
    ("blk, hblk, {0: 0, 1: -1}", PI),
    ("blk, hblk, {0: 1, 2: 1}", PI),
    ("blk, hblk, ids((0, 1), (2, 1))", PI),
    ("blk, hsame, {0: 6}", PI),
    # HOST <-> DEVICE only
    ("blk, blk, {0: 1}", PI),
    ("blk, yblk, {0: 1}", PI),
    ("hblk, cpu, {0: 1}", PI),
    ("cpu, cpu, {0: 1}", PI),
    ("blk, blk, {}", PI),
    # ended
    ("bgone, hblk, {0: 0}", PI),
    ("blk, hgone, {0: 0}", PI),
    ("blk, hgone, {}", PI),
]

CALLS = [
    (name, text, fault)
    for name, rows in (
        ("copy_cache", COPY_CACHE),
        ("copy_blocks", COPY_BLOCKS),
        ("swap_blocks", SWAP_BLOCKS),
    )
    for text, fault in rows
]


@pytest.mark.parametrize(("method", "text", "fault"), CALLS)
def test_call_refused_before_a_byte_moves(world, method, text, fault):
    names = vars(world) | {"torch": torch, "ids": ids}
    arguments = eval(f"({text},)", names)
    before = world.bytes()
    with raises(fault):
        getattr(world.manager, method)(*arguments)
    assert world.bytes() == before


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("copy_blocks", "blk, {}"),
        ("copy_blocks", "blk, {0: []}"),
        ("copy_blocks", "blk, ids()"),
        ("copy_blocks", "blk, {1: [1]}"),
        ("swap_blocks", "blk, hblk, {}"),
        ("swap_blocks", "blk, cpu, ids()"),
        ("copy_cache", "con, con"),
        ("copy_cache", "con, con, 3, 3, 5, 7, 2**64 - 1"),
    ],
)
def test_calls_that_change_nothing(world, method, text):
    names = vars(world) | {"ids": ids}
    before = world.bytes()
    assert getattr(world.manager, method)(*eval(f"({text},)", names)) is None
    assert world.bytes() == before


def test_copy_cache_vector(world):
    """Appendix A: copy_cache(dst, src, 0, 1, 4, 8)."""
    description = CacheDesc(4, [2, 8], DataType.DT_FLOAT16)
    dst, src = (world.manager.allocate_cache(description) for _ in range(2))
    scramble(src.tensors, 1)
    scramble(dst.tensors, 2)
    before = [raw(t) for t in dst.tensors]
    world.manager.copy_cache(dst, src, 0, 1, 4, 8)
    for tensor, old, new in zip(dst.tensors, before, src.tensors, strict=True):
        assert raw(tensor) == old[:4] + raw(new)[20:28] + old[12:]


@pytest.mark.parametrize("size", [-1, 16])
def test_copy_cache_between_unlike_rows(world, size):
    """-1 is the rest of the source row; dtype and shape need not match."""
    before = [raw(t) for t in world.con.tensors]
    world.manager.copy_cache(world.con, world.con2, 3, 2, 0, size)
    for tensor, old, new in zip(world.con.tensors, before, world.con2.tensors, strict=True):
        assert raw(tensor) == old[:96] + raw(new)[32:48] + old[112:]


@pytest.mark.parametrize("placements", [(p, q) for p in Placement for q in Placement])
def test_copy_cache_in_any_placement(instance_factory, placements):
    manager = instance_factory().cache_manager
    src, dst = (manager.allocate_cache(desc(placement=p)) for p in placements)
    scramble(src.tensors, 3)
    manager.copy_cache(dst, src, 2, 1)
    assert raw(dst.tensors[1][2]) == raw(src.tensors[1][1])


def test_swap_there_and_back(world):
    """Appendix A."""
    description = desc(2, (8, 8))
    device = world.manager.allocate_blocks_cache(description)
    cpu = Cache.create_cpu_cache(host(2, (8, 8)), tensors_of(host(2, (8, 8))))
    scramble(device.tensors, 4)
    block = [raw(t) for t in device.block(3)]
    world.manager.swap_blocks(device, cpu, {3: 5})
    assert [raw(t) for t in cpu.block(5)] == block
    assert [raw(t) for t in device.block(3)] == block  # a copy, no exchange
    scramble([t.view(1, -1) for t in device.block(3)], 9)
    world.manager.swap_blocks(cpu, device, {5: 3})
    assert [raw(t) for t in device.block(3)] == block


def test_swap_with_caches_of_another_instance(world):
    world.manager.swap_blocks(world.yblk, world.hblk, {0: 1})
    assert [raw(t) for t in world.hblk.block(1)] == [raw(t) for t in world.yblk.block(0)]


@pytest.mark.parametrize("form", ["dict", "tensor"])
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 1), (1, 2), (2, 3)],  # chain
        [(0, 1), (1, 0)],  # cycle
        [(0, 1), (1, 2), (2, 0), (0, 3)],
        [(3, 0), (3, 1), (3, 2)],  # fan-out
        [(0, 0), (0, 1)],
    ],
)
def test_copy_blocks_is_a_snapshot(world, form, pairs):
    """14.49."""
    before = [raw(t) for t in world.blk.tensors]
    if form == "tensor":
        info = ids(*pairs)
    else:
        info = {}
        for src, dst in pairs:
            info.setdefault(src, []).append(dst)
    world.manager.copy_blocks(world.blk, info)
    for tensor, old in zip(world.blk.tensors, before, strict=True):
        model = bytearray(old)
        reference.copy_blocks(model, 32, [p[0] for p in pairs], [p[1] for p in pairs])
        assert raw(tensor) == bytes(model)


def test_string_caches_are_copied(world):
    cache = world.manager.allocate_blocks_cache(desc(dtype=DataType.DT_STRING))
    scramble(cache.tensors, 3)
    world.manager.copy_blocks(cache, {0: [3]})
    assert torch.equal(cache.tensors[1][0], cache.tensors[1][3])


@pytest.mark.parametrize("inside", [False, True])
def test_inference_tensors(world, inside):
    with torch.inference_mode():
        made = tensors_of(desc())
        early = world.manager.register_blocks_cache(desc(), made)
        grown = world.manager.allocate_blocks_cache(desc())
    late = world.manager.register_blocks_cache(desc(), made)
    for cache in (early, late, grown):
        scramble_inference(cache, 3)
        with torch.inference_mode(inside):
            world.manager.copy_blocks(cache, {0: [1]})
            world.manager.swap_blocks(cache, world.hblk, {0: 2})
        assert torch.equal(cache.tensors[0][0], cache.tensors[0][1])
        assert raw(world.hblk.tensors[0][2]) == raw(cache.tensors[0][1])


def scramble_inference(cache: Cache, seed: int) -> None:
    with torch.inference_mode():
        scramble(cache.tensors, seed)

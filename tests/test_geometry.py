# SPDX-License-Identifier: Apache-2.0
"""Geometry against the obvious: every byte of every run, worked out one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist_torch import LLMParamError
from llm_datadist_torch.movement import geometry
from llm_datadist_torch.values.layout import Layout


def moved(runs: torch.Tensor) -> list[tuple[int, int]]:
    """(destination byte, source byte) of everything the runs move, in order."""
    return [(dst + at, src + at) for dst, src, nbytes in runs.tolist() for at in range(nbytes)]


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def paged_pairs(draw):
    """Two paged layouts of equal blocks, and block lists that fit them."""
    nbytes = draw(st.integers(1, 5))
    layouts = [
        Layout(1, draw(st.integers(1, 8)), nbytes, nbytes + draw(st.sampled_from([0, 0, 3])), True)
        for _ in range(2)
    ]
    dst, src = layouts
    dst_ids = draw(st.lists(st.integers(0, dst.rows - 1), unique=True))
    src_ids = draw(
        st.lists(st.integers(0, src.rows - 1), min_size=len(dst_ids), max_size=len(dst_ids))
    )
    return dst, src, dst_ids, src_ids


@given(paged_pairs())
def test_blocks_to_blocks_moves_every_byte_of_every_pair(case):
    dst, src, dst_ids, src_ids = case
    runs = geometry.blocks_to_blocks(dst, src, ids(*dst_ids), ids(*src_ids))
    expected = [
        (d * dst.row_stride_bytes + at, s * src.row_stride_bytes + at)
        for d, s in zip(dst_ids, src_ids, strict=True)
        for at in range(dst.row_bytes)
    ]
    assert moved(runs) == expected


def test_adjacent_blocks_are_one_run():
    layout = Layout(1, 8, 4, 4, True)
    runs = geometry.blocks_to_blocks(layout, layout, ids(4, 5, 6, 0), ids(1, 2, 3, 7))
    assert runs.tolist() == [[16, 4, 12], [0, 28, 4]]


@given(
    block=st.integers(1, 6),
    row=st.integers(1, 20),
    gap=st.sampled_from([0, 2]),
    src_row=st.integers(0, 2),
    data=st.data(),
)
def test_row_to_blocks_cuts_the_row_and_nothing_else(block, row, gap, src_row, data):
    dst, src = Layout(1, 24, block, block, True), Layout(1, 3, row, row + gap, False)
    listed = data.draw(st.lists(st.integers(0, dst.rows - 1), unique=True, min_size=1))
    if block > row or len(listed) > -(-row // block):
        with pytest.raises(LLMParamError):
            geometry.row_to_blocks(dst, src, ids(*listed), src_row)
        return
    expected = [
        (d * block + at, src_row * src.row_stride_bytes + k * block + at)
        for k, d in enumerate(listed)
        for at in range(min(block, row - k * block))
    ]
    assert moved(geometry.row_to_blocks(dst, src, ids(*listed), src_row)) == expected


@pytest.mark.parametrize(
    ("checked", "unique", "text"),
    [
        ([8], False, r"blocks\[0\]=8 is out of range \[0, 8\)"),
        ([0, -1], False, r"blocks\[1\]=-1"),
        ([3, 1, 3], True, r"blocks\[2\]=3 repeats blocks\[0\]"),
    ],
)
def test_bad_ids_are_named_by_position(checked, unique, text):
    with pytest.raises(LLMParamError, match=text):
        geometry.check_rows("blocks", ids(*checked), Layout(1, 8, 4, 4, True), unique=unique)


def test_block_lists_must_be_equally_long():
    layout = Layout(1, 8, 4, 4, True)
    with pytest.raises(LLMParamError, match="2 src_blocks for 1 dst_blocks"):
        geometry.blocks_to_blocks(layout, layout, ids(0), ids(0, 1))


def test_block_sizes_must_be_equal():
    with pytest.raises(LLMParamError, match="block sizes differ"):
        geometry.blocks_to_blocks(
            Layout(1, 8, 4, 4, True), Layout(1, 8, 8, 8, True), ids(0), ids(0)
        )


@pytest.mark.parametrize(
    ("counts", "dst", "src", "per_layer", "expected"),
    [
        ((4, 4), None, None, 2, (range(4), range(4))),
        ((3, 3), None, None, 2, (range(3), range(3))),
        ((4, 6), None, range(1, 3), 2, (range(4), range(2, 6))),
        ((4, 2), range(1, 2), None, 2, (range(2, 4), range(2))),
        ((4, 4), range(1), range(1, 2), 2, (range(2), range(2, 4))),
        ((6, 6), range(1, 2), range(1), 3, (range(3, 6), range(3))),
        ((4, 6), None, None, 2, None),
        ((4, 4), None, range(1, 2), 2, None),
        ((4, 4), range(1, 3), range(2), 2, None),
        ((4, 4), range(1), range(2, 3), 2, None),
        ((3, 4), range(1), range(1), 2, None),
    ],
)
def test_pulled_tensors(counts, dst, src, per_layer, expected):
    if expected is None:
        with pytest.raises(LLMParamError):
            geometry.pulled_tensors(*counts, dst, src, per_layer)
    else:
        assert geometry.pulled_tensors(*counts, dst, src, per_layer) == expected


@pytest.mark.parametrize(
    ("count", "src", "dst", "per_layer", "expected"),
    [
        (4, None, None, 2, (range(4), range(4))),
        (4, range(1, 2), range(5, 6), 2, (range(2, 4), range(10, 12))),
        (3, None, None, 2, None),
        (1, None, None, 2, None),
        (4, range(1, 2), None, 2, None),
        (4, range(2, 3), range(1), 2, None),
    ],
)
def test_pushed_tensors(count, src, dst, per_layer, expected):
    if expected is None:
        with pytest.raises(LLMParamError):
            geometry.pushed_tensors(count, src, dst, per_layer)
    else:
        assert geometry.pushed_tensors(count, src, dst, per_layer) == expected


def test_huge_ranges_cost_nothing():
    huge = range(2**31)
    with pytest.raises(LLMParamError):
        geometry.pulled_tensors(4, 4, huge, huge, 2)

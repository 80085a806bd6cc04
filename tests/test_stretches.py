# SPDX-License-Identifier: Apache-2.0
"""What a peer may ask for, and how movements are cut into requests of engines: C++ and models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist_torch import _C


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def model_inside(stretches, bases, extent, row_stride_bytes, row_bytes) -> int:
    """Byte by byte: a stretch must lie in one row, or where rows touch in one tensor."""

    def row_of(base: int, address: int) -> int | None:
        at = address - base
        if not 0 <= at < extent or at % row_stride_bytes >= row_bytes:
            return None
        return 0 if row_stride_bytes == row_bytes else at // row_stride_bytes

    for start, size in stretches:
        rows = [[row_of(base, start + i) for i in range(size)] for base in bases]
        if size <= 0 or not any(row[0] is not None and len(set(row)) == 1 for row in rows):
            return -1
    return sum(size for _, size in stretches)


@given(
    stretches=st.lists(st.tuples(st.integers(90, 160), st.integers(-1, 12)), max_size=4),
    offsets=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rows=st.integers(1, 4),
    row_bytes=st.integers(1, 6),
    gap=st.integers(0, 6),
)
def test_what_lies_inside(stretches, offsets, rows, row_bytes, gap):
    bases, row_stride_bytes = [100 + offset for offset in offsets], row_bytes + gap
    extent = (rows - 1) * row_stride_bytes + row_bytes
    starts, sizes = torch.tensor(stretches, dtype=torch.int64).view(-1, 2).unbind(1)
    found = _C.bytes_inside(starts, sizes, ints(*bases), extent, row_stride_bytes, row_bytes)
    assert found == model_inside(stretches, bases, extent, row_stride_bytes, row_bytes)


def test_what_no_memory_has_is_not_inside():
    most = 2**63 - 1
    for start, size in ((most, most), (-1, 1), (0, most), (100, most), (-(2**63), 8), (101, most)):
        assert _C.bytes_inside(ints(start), ints(size), ints(100), 64, 8, 8) == -1
    # More bytes than can be counted are still more than any limit.
    whole = ints(0, 0, 0), ints(most, most, most)
    assert _C.bytes_inside(*whole, ints(0), most, most, most) == most


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((ints(1), ints(1, 2), ints(1), 8, 8, 8), "sizes 2"),
        ((ints(1), ints(1), ints(1), -1, 8, 8), "describe no tensor"),
        ((ints(1), ints(1), ints(1), 8, 0, 0), "describe no tensor"),
        ((ints(1), ints(1), ints(1), 8, 4, 8), "describe no tensor"),
        ((ints(1).float(), ints(1), ints(1), 8, 8, 8), "int64"),
        ((ints(1)[None], ints(1), ints(1), 8, 8, 8), "1-D int64"),
    ],
)
def test_no_such_stretches(args, text):
    with pytest.raises((ValueError, TypeError), match=text):
        _C.bytes_inside(*args)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((ints(1, 1, 1), (0, 0), 8, 8), "2-D int64"),
        ((ints(1, 1)[:, None], (0, 0), 8, 8), "3 rows"),
        ((ints(1, 1, 1)[:, None], (0, 0), 0, 8), "must be positive"),
        ((ints(1, 1, 1)[:, None], (0, 0), 8, 0), "must be positive"),
        ((ints(1, 1, -1)[:, None], (0, 0), 8, 8), "no byte 0"),
        ((ints(1, 1, 2)[:, None], (0, 2), 8, 8), "no byte 2"),
        ((ints(1, 1, 2)[:, None], (-1, 0), 8, 8), "no run -1"),
    ],
)
def test_no_such_request(args, text):
    with pytest.raises((ValueError, TypeError, IndexError), match=text):
        _C.engine_request(*args)


def test_after_the_last_run_nothing_is_requested():
    here, there, cursor = _C.engine_request(ints(1, 1, 2)[:, None], (1, 0), 8, 8)
    assert (len(here), len(there), cursor) == (0, 0, (1, 0))


def test_a_run_of_any_size_is_cut_one_request_at_a_time():
    runs = ints(1, 2, 2**62)[:, None].expand(3, 1 << 18)
    here, there, cursor = _C.engine_request(runs, (7, 5), 1 << 20, 1)
    assert here.tolist() == [[6, 1 << 20, 0]]
    assert there.tolist() == [[7, 1 << 20, 0]]
    assert cursor == (7, 5 + (1 << 20))

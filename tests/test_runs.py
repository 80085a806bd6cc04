# SPDX-License-Identifier: Apache-2.0
"""block_runs and copy_runs: what the native module does with bare addresses."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import _C, ops
from tests import reference

CANARY = 0xA5


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.integers(1, 64),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_block_runs_equal_the_model(pairs, nbytes, dst_gap, src_gap):
    dst = [d for d, _ in pairs]
    src = [s for _, s in pairs]
    row_strides = (nbytes + dst_gap, nbytes + src_gap)
    runs = _C.block_runs(ops.as_ids(dst), ops.as_ids(src), *row_strides, nbytes)
    assert runs.shape[1] == 3
    assert runs.tolist() == reference.block_runs(dst, src, *row_strides, nbytes)


def bases(*tensors):
    return ops.as_ids([t.data_ptr() for t in tensors])


def test_copy_runs():
    src = torch.arange(100, dtype=torch.uint8)
    dst = torch.full((100,), CANARY, dtype=torch.uint8)
    runs = torch.tensor([[3, 10, 5], [50, 0, 20]])
    assert _C.copy_runs(bases(dst), bases(src), runs) == 25
    expected = torch.full((100,), CANARY, dtype=torch.uint8)
    expected[3:8] = src[10:15]
    expected[50:70] = src[:20]
    assert torch.equal(dst, expected)


def test_copy_runs_stops_at_the_deadline():
    src = torch.zeros(64 << 20, dtype=torch.uint8)
    dst = torch.ones(64 << 20, dtype=torch.uint8)
    runs = torch.tensor([[0, 0, 64 << 20]])
    assert _C.copy_runs(bases(dst), bases(src), runs, 1) == 0
    assert bool(dst.all())
    future = time.monotonic_ns() + 60 * 10**9
    assert _C.copy_runs(bases(dst), bases(src), runs, deadline_ns=future) == 64 << 20
    assert not bool(dst.any())


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([[-1, 0, 4]], "negative"),
        ([[0, 0, -4]], "negative"),
        ([[0, 0, 2**62], [0, 0, 2**62]], "exceed"),
    ],
)
def test_copy_runs_refuses(runs, text):
    t = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=text):
        _C.copy_runs(bases(t), bases(t), torch.tensor(runs))


def test_copy_runs_refuses_shapes():
    t = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="columns"):
        _C.copy_runs(bases(t), bases(t), torch.zeros((1, 2), dtype=torch.int64))
    with pytest.raises(ValueError, match="2-D int64"):
        _C.copy_runs(bases(t), bases(t), torch.zeros((1, 3)))
    with pytest.raises(ValueError, match="src_bases 2"):
        _C.copy_runs(bases(t), bases(t, t), torch.zeros((1, 3), dtype=torch.int64))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (([-1], [0], 8, 8, 8), r"dst_ids\[0\]=-1"),
        (([0], [2**60], 8, 64, 8), r"src_ids\[0\]"),
        (([0], [0], 4, 8, 8), "row_stride_bytes 4 is smaller"),
        (([0], [0], 8, 8, 0), "nbytes=0"),
        (([0, 1], [0], 8, 8, 8), "dst_ids has 2"),
    ],
)
def test_block_runs_refuses(args, text):
    with pytest.raises(ValueError, match=text):
        _C.block_runs(ops.as_ids(args[0]), ops.as_ids(args[1]), *args[2:])

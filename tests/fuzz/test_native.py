# SPDX-License-Identifier: Apache-2.0
"""The C++ entry points with arguments that make no sense: an error or a right copy, never a crash.

What is written lies inside the tensors that were given; the bytes around them are compared.
"""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import _C

CANARY = 0xA5
DTYPES = [torch.uint8, torch.int64, torch.float16, torch.bool, torch.complex64]
REFUSED = (RuntimeError, ValueError, TypeError, IndexError, OSError, MemoryError, OverflowError)

INTS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**63, 2**64]),
    st.integers(-(2**70), 2**70),
)
SMALL = st.integers(0, 5)
SHAPES = st.lists(SMALL, max_size=4)
fuzz = settings(deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "30")))


class Held:
    """A tensor inside a buffer of canaries; ``inside`` says which bytes are its own."""

    def __init__(self, dtype: torch.dtype, shape: list[int], strides: list[int], at: int) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        self.buffer = torch.full((4096,), CANARY, dtype=torch.uint8)
        typed = self.buffer.view(dtype)
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
        if at + reach >= typed.numel():
            at, strides = 0, [1] * len(shape)
        self.tensor = typed.as_strided(shape, strides, at)
        places = torch.tensor([at])
        for n, step in zip(shape, strides, strict=True):
            places = (places.unsqueeze(-1) + torch.arange(n) * step).flatten()
        self.inside = torch.zeros(typed.numel(), dtype=torch.bool)
        self.inside[places] = True
        self.inside = self.inside.repeat_interleave(size)

    def check(self) -> None:
        assert bool((self.buffer[~self.inside] == CANARY).all())


@st.composite
def held(draw: st.DrawFn) -> Held:
    shape = draw(SHAPES)
    dense = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        dense[d] = dense[d + 1] * max(1, shape[d + 1])
    strides = draw(
        st.one_of(st.just(dense), st.lists(SMALL, min_size=len(shape), max_size=len(shape)))
    )
    return Held(draw(st.sampled_from(DTYPES)), shape, strides, draw(st.integers(0, 40)))


@st.composite
def index_tensors(draw: st.DrawFn, columns: int = 0) -> torch.Tensor:
    """Mostly an int64 list of small numbers, sometimes something else."""
    number = st.one_of(st.integers(0, 6), st.integers(-(2**63), 2**63 - 1))
    if draw(st.booleans()):
        number = st.integers(0, 4)
    rows = draw(st.integers(0, 6))
    made = torch.tensor(
        draw(st.lists(number, min_size=rows * max(1, columns), max_size=rows * max(1, columns))),
        dtype=torch.int64,
    )
    if columns:
        made = made.view(-1, columns)
    kind = draw(st.integers(0, 12))
    if kind == 0:
        return made.to(torch.int32)
    if kind == 1:
        return made.to(torch.float64)
    if kind == 2:
        return made.unsqueeze(0)
    if kind == 3:
        return torch.stack([made, made], -1)[..., 0]
    if kind == 4:
        return made.flip(0)
    if kind == 5:
        return made.to("meta")
    if kind == 6:
        return torch.tensor(3)
    return made


def attempt(call, *args, **kwargs):
    """What it returns; None if it refuses, in a way that Python knows."""
    try:
        return call(*args, **kwargs)
    except REFUSED:
        return None


@fuzz
@given(st.lists(held(), max_size=3), st.lists(held(), max_size=3), index_tensors(), index_tensors())
def test_ops_with_blocks(dst: list[Held], src: list[Held], first: torch.Tensor, second) -> None:
    ops = torch.ops.llm_datadist_torch
    dst_tensors, src_tensors = [h.tensor for h in dst], [h.tensor for h in src]
    attempt(ops.copy_blocks, dst_tensors, first, second)
    attempt(ops.swap_blocks, dst_tensors, src_tensors, first, second)
    attempt(ops.swap_blocks, dst_tensors, dst_tensors, first, second)
    for each in [*dst, *src]:
        each.check()
    # A source is never written.
    assert all(bool((h.buffer == CANARY).all()) for h in src)


@fuzz
@given(st.lists(held(), max_size=3), st.lists(held(), max_size=3), INTS, INTS, INTS, INTS)
def test_ops_with_rows(
    dst: list[Held], src: list[Held], dst_row: int, src_row: int, offset: int, nbytes: int
) -> None:
    call = torch.ops.llm_datadist_torch.copy_rows
    attempt(
        call, [h.tensor for h in dst], [h.tensor for h in src], dst_row, src_row, offset, nbytes
    )
    for each in [*dst, *src]:
        each.check()
    assert all(bool((h.buffer == CANARY).all()) for h in src)


@fuzz
@given(index_tensors(), index_tensors(), INTS, INTS, INTS)
def test_block_runs(
    first, second, dst_row_stride_bytes: int, src_row_stride_bytes: int, nbytes: int
) -> None:
    runs = attempt(_C.block_runs, first, second, dst_row_stride_bytes, src_row_stride_bytes, nbytes)
    if runs is not None and runs.numel():
        assert int(runs.min()) >= 0
        attempt(_C.measure_runs, runs)
    attempt(_C.check_ids, "ids", first, dst_row_stride_bytes, True)


@fuzz
@given(index_tensors(3), index_tensors(4))
def test_measure_runs(runs, wide) -> None:
    for table in (runs, wide):
        measured = attempt(_C.measure_runs, table)
        if measured is not None:
            assert min(measured) >= 0


@fuzz
@given(index_tensors(), INTS, INTS, INTS, INTS)
def test_rebase(addrs, start: int, to: int, nbytes: int, extent: int) -> None:
    moved = attempt(_C.rebase, addrs, start, to, nbytes, extent)
    if moved is not None and 0 <= to < 2**62 and nbytes < 2**62:
        assert all(to <= address <= to + nbytes - extent for address in moved.tolist())


@fuzz
@given(index_tensors(), index_tensors(), index_tensors(), INTS, INTS, INTS)
def test_bytes_inside(
    starts, sizes, bases, extent: int, row_stride_bytes: int, row_bytes: int
) -> None:
    found = attempt(_C.bytes_inside, starts, sizes, bases, extent, row_stride_bytes, row_bytes)
    if found is not None and found >= 0:
        assert bool((sizes > 0).all())


@fuzz
@given(index_tensors(3), st.tuples(INTS, INTS), INTS, INTS)
def test_engine_requests(runs, start: tuple[int, int], max_bytes: int, max_runs: int) -> None:
    for table in (runs, runs.T if runs.dim() == 2 else runs):
        found = attempt(_C.engine_request, table, start, max_bytes, max_runs)
        if found is not None:
            assert int(found[0][:, 1].sum()) <= max_bytes
            assert len(found[0]) == len(found[1]) <= max_runs


@fuzz
@given(index_tensors(3), st.integers(0, 3), INTS, st.integers(-3, 3))
def test_copies_of_runs_inside(runs, count: int, deadline: int, more: int) -> None:
    """Bases and runs are trusted once ``measure_runs`` has been asked, as all callers do."""
    src, dst = torch.zeros(64, dtype=torch.uint8), torch.full((192,), CANARY, dtype=torch.uint8)
    bases = torch.full((count,), dst.data_ptr() + 64)
    sources = torch.full((max(0, count + more),), src.data_ptr())
    measured = attempt(_C.measure_runs, runs)
    if measured is None or measured[1] > 64 or measured[2] > 64:
        return
    attempt(_C.copy_runs, bases, sources, runs, deadline)
    attempt(_C.copy_runs_on_stream, bases, sources, runs, 1, 0, deadline)
    assert bool((dst[:64] == CANARY).all())
    assert bool((dst[128:] == CANARY).all())


@fuzz
@given(INTS, index_tensors(), index_tensors(), index_tensors(3))
def test_process_memory(pid: int, local, remote, runs) -> None:
    """The kernel checks addresses: those of nobody are an error, whatever they are."""
    here = torch.full((192,), CANARY, dtype=torch.uint8)
    for call in (_C.read_process, _C.write_process):
        # Only addresses below the first page, which nobody can map.
        if (
            local.dtype == torch.int64
            and not local.is_meta
            and local.numel()
            and local.max() < 4096
        ):
            attempt(call, pid, local, remote, runs)
    assert bool((here == CANARY).all())


@fuzz
@given(INTS, st.lists(INTS, max_size=3), st.lists(INTS, max_size=4), st.sampled_from(DTYPES))
def test_regions(nbytes: int, offsets: list[int], shape: list[int], dtype: torch.dtype) -> None:
    region = attempt(_C.HostRegion.create, nbytes if nbytes < 2**24 or nbytes > 2**47 else 4096)
    if region is None:
        region = _C.HostRegion.create(1 << 16)
    start, end = region.address, region.address + region.nbytes
    for tensor in attempt(region.tensors, offsets, shape, dtype) or []:
        assert start <= tensor.data_ptr() or not tensor.numel()
        assert tensor.data_ptr() + tensor.nbytes <= end
    attempt(_C.PeerMapping.open, nbytes, *[*offsets, 0, 0, 0][:3], nbytes)
    attempt(_C.tensor_over, 0, shape, dtype)


@fuzz
@given(held(), INTS, INTS, st.lists(INTS, max_size=4), st.sampled_from(DTYPES))
def test_arenas(base: Held, shift: int, count: int, shape: list[int], dtype: torch.dtype) -> None:
    attempt(_C.Arena, base.tensor, shift)
    memory = torch.full((8 << 10,), CANARY, dtype=torch.uint8)
    arena = _C.Arena(memory[2048:6144], 10)
    spans = attempt(arena.spans, count if count < 10**6 else 2**62, max(1, abs(shift) % 4096)) or []
    for span in spans:
        tensor = attempt(span.tensor, shape, dtype, _C.MoveFlag())
        if tensor is not None:
            tensor.zero_()
    assert bool((memory[:2048] == CANARY).all())
    assert bool((memory[6144:] == CANARY).all())
    span = spans = tensor = None
    total, free, _, spans = arena.stats()
    assert (total, spans) == (free, 0)


@fuzz
@given(index_tensors(), INTS)
def test_probes(addrs, nbytes: int) -> None:
    found = attempt(_C.probe_extents, addrs, nbytes)
    first = attempt(_C.check_mapped, addrs, nbytes)
    if found is not None and found[0] < 0 and addrs.numel():
        assert first in (-1, None)

# SPDX-License-Identifier: Apache-2.0
"""The copy ops against the slow model, and every way to call them wrongly."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llm_datadist_torch.memory import streams
from llm_datadist_torch.movement import ops
from tests import reference
from tests.devices import default_device, examples

CANARY = 0xA5


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Where the kernels that are tested work."""
    return tensor.to(default_device())


class Blocks:
    """A tensor of blocks with canary bytes before, between and behind them."""

    def __init__(
        self,
        blocks: int,
        nbytes: int,
        gap: int,
        seed: int,
        lead: int = 1,
        place: Callable[[torch.Tensor], torch.Tensor] = on_device,
    ) -> None:
        layout = (blocks, nbytes), (nbytes + gap, 1), lead
        whole = torch.full((lead + blocks * (nbytes + gap) + 64,), CANARY, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(0, 256, (blocks, nbytes), dtype=torch.uint8, generator=generator)
        whole.as_strided(*layout).copy_(data)
        self.whole = place(whole)
        self.tensor = self.whole.as_strided(*layout)
        self.model = bytearray(data.numpy().tobytes())

    def check(self) -> None:
        whole = self.whole.cpu()
        layout = self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        assert whole.as_strided(*layout).contiguous().numpy().tobytes() == bytes(self.model)
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside.as_strided(*layout).fill_(False)
        assert bool((whole[outside] == CANARY).all()), "wrote outside the blocks"


@st.composite
def block_pairs(draw: st.DrawFn, sources: int, targets: int) -> tuple[list[int], list[int]]:
    dst = draw(st.lists(st.integers(0, targets - 1), unique=True, max_size=targets))
    src = draw(st.lists(st.integers(0, sources - 1), min_size=len(dst), max_size=len(dst)))
    return src, dst


LAYOUT = st.tuples(st.integers(1, 300), st.integers(0, 70), st.integers(0, 65))


@settings(deadline=None, max_examples=examples(150))
@given(st.data(), st.integers(1, 12), LAYOUT, st.integers(1, 3))
def test_copy_blocks_equals_the_model(data, blocks, layout, count):
    nbytes, gap, lead = layout
    src, dst = data.draw(block_pairs(blocks, blocks))
    tensors = [Blocks(blocks, nbytes, gap, seed, lead) for seed in range(count)]
    ops.copy_blocks([t.tensor for t in tensors], src, dst)
    for t in tensors:
        reference.copy_blocks(t.model, nbytes, src, dst)
        t.check()


@settings(deadline=None, max_examples=examples(150))
@given(st.data(), st.integers(1, 9), st.integers(1, 9), LAYOUT, LAYOUT, st.integers(1, 3))
def test_swap_blocks_equals_the_model(data, blocks, others, layout, other_layout, count):
    nbytes, gap, lead = layout
    _, other_gap, other_lead = other_layout
    src, dst = data.draw(block_pairs(others, blocks))
    to = [Blocks(blocks, nbytes, gap, seed, lead) for seed in range(count)]
    at = [Blocks(others, nbytes, other_gap, 100 + seed, other_lead) for seed in range(count)]
    ops.swap_blocks([t.tensor for t in to], [t.tensor for t in at], dst, src)
    for t, s in zip(to, at, strict=True):
        reference.swap_blocks(t.model, bytes(s.model), nbytes, dst, src)
        t.check()
        s.check()


@settings(deadline=None, max_examples=examples(150))
@given(st.data(), LAYOUT, LAYOUT, st.booleans())
def test_copy_rows_equals_the_model(data, layout, other_layout, same):
    to = Blocks(4, layout[0], layout[1], 1, layout[2])
    at = to if same else Blocks(3, other_layout[0], other_layout[1], 2, other_layout[2])
    dst_row = data.draw(st.integers(0, 3))
    src_row = data.draw(st.integers(0, at.tensor.size(0) - 1))
    limit = min(to.tensor.size(1), at.tensor.size(1))
    offset = data.draw(st.integers(0, limit))
    nbytes = data.draw(st.integers(0, limit - offset))
    ops.copy_rows([to.tensor], [at.tensor], dst_row, src_row, offset, nbytes)
    strides = (to.tensor.size(1), at.tensor.size(1))
    reference.copy_rows(to.model, at.model, (dst_row, src_row), strides, (offset, nbytes))
    to.check()
    at.check()


@pytest.mark.parametrize("seed", range(100))
def test_copy_blocks_random_graphs(seed):
    """Chains, fans, rings and trees that hang on rings, in one call."""
    rng = random.Random(seed)
    blocks = rng.randint(2, 60)
    dst = rng.sample(range(blocks), rng.randint(1, blocks))
    kind = seed % 4
    if kind == 0:  # rings only: a permutation
        src = rng.sample(dst, len(dst))
    elif kind == 1:  # everything shifted by one, up or down
        step = rng.choice([-1, 1])
        dst = list(range(1, blocks - 1))
        src = [d + step for d in dst]
    elif kind == 2:  # fans of few sources
        src = [rng.choice(dst[:3]) for _ in dst]
    else:
        src = [rng.randrange(blocks) for _ in dst]
    tensors = [Blocks(blocks, 4096 + 8, 24, t, lead=8) for t in range(3)]
    ops.copy_blocks([t.tensor for t in tensors], src, dst)
    for t in tensors:
        reference.copy_blocks(t.model, 4096 + 8, src, dst)
        t.check()


@pytest.mark.parametrize("ring", [False, True])
def test_large_copies_stream_in_threads(ring):
    """Above the sizes from which threads and streaming stores are used, at odd addresses."""
    blocks, nbytes = 24, (1 << 20) + 3
    tensors = [Blocks(blocks, nbytes, 61, t, lead=5) for t in range(2)]
    src = [*range(1, 12), 0] if ring else list(range(12, 24))
    dst = list(range(12))
    ops.copy_blocks([t.tensor for t in tensors], src, dst)
    for t in tensors:
        reference.copy_blocks(t.model, nbytes, src, dst)
        t.check()


def test_interleaved_views_do_not_overlap():
    kv = on_device(torch.arange(4 * 2 * 8, dtype=torch.float32).reshape(4, 2, 8))
    before = kv.clone()
    ops.copy_blocks([kv[:, 0], kv[:, 1]], [0], [3])
    before[3] = before[0]
    assert torch.equal(kv, before)
    ops.swap_blocks([kv[:, 0]], [kv[:, 1]], [1, 2], [1, 1])
    before[1, 0] = before[2, 0] = before[1, 1]
    assert torch.equal(kv, before)


def unchanged(tensor):
    return torch.equal(tensor.cpu(), torch.arange(tensor.numel()).reshape(tensor.shape))


@pytest.mark.parametrize(
    ("src", "dst", "error", "text"),
    [
        ([0, 1, 4], [1, 2, 3], IndexError, r"src_ids\[2\]=4 is out of range \[0, 4\)"),
        ([0, -1], [1, 2], IndexError, r"src_ids\[1\]=-1 is out of range"),
        ([0], [2**63 - 1], IndexError, r"dst_ids\[0\]=9223372036854775807 is out of range"),
        ([0, 1, 2], [3, 1, 3], ValueError, r"dst_ids\[2\]=3 repeats dst_ids\[0\]"),
        ([0, 1], [1], ValueError, "dst_ids has 1 ids, but src_ids 2"),
        ([0.5], [1], TypeError, r"ids\[0\]=0.5 is a float"),
        ([True], [1], TypeError, "is a bool"),
        ([2**63], [1], ValueError, "does not fit"),
        ("0", [1], TypeError, "got str"),
        (torch.tensor([0.0]), [1], TypeError, "float32"),
        (torch.tensor([[0]]), [1], ValueError, "1-D"),
    ],
)
def test_bad_ids(src, dst, error, text):
    tensor = good()
    with pytest.raises(error, match=text):
        ops.copy_blocks([tensor], src, dst)
    assert unchanged(tensor)
    with pytest.raises(error, match=text):
        ops.swap_blocks([tensor], [zeros(4, 2)], dst, src)
    assert unchanged(tensor)


def good():
    return on_device(torch.arange(8).reshape(4, 2))


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device=default_device())


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (zeros(4, 4, dtype=torch.float32)[:, ::2], "not contiguous"),
        (zeros(1, 2, dtype=torch.float32).expand(4, 2), "overlap"),
        (on_device(torch.tensor(1.0)), "no dimension"),
        (zeros(4, 3), r"tensors\[1\] has rows of 24 bytes"),
        (zeros(4, 4)[:, :2], r"tensors\[1\] has rows 32 bytes apart"),
        (zeros(3, 2), r"out of range \[0, 3\)"),
    ],
)
def test_bad_tensors(tensor, text):
    first = good()
    with pytest.raises((ValueError, IndexError), match=text):
        ops.copy_blocks([first, tensor], [0], [3])
    assert unchanged(first)


def test_sparse_tensors_have_no_kernel():
    with pytest.raises(NotImplementedError, match="copy_blocks"):
        ops.copy_blocks([torch.zeros(4, 2).to_sparse()], [0], [3])


def test_shared_memory_is_refused():
    tensor = good()
    with pytest.raises(ValueError, match=r"tensors\[0\] and tensors\[1\] share memory"):
        ops.copy_blocks([tensor, tensor], [0], [1])
    with pytest.raises(ValueError, match=r"dst\[0\] and dst\[1\] share memory"):
        ops.swap_blocks([tensor, tensor[1:]], [good(), good()], [0], [1])
    with pytest.raises(ValueError, match=r"dst_ids\[1\] of dst\[0\] and src_ids\[0\] of src\[0\]"):
        ops.swap_blocks([tensor], [tensor], [3, 0], [0, 1])
    with pytest.raises(ValueError, match="share memory in part"):
        ops.copy_rows([tensor.view(2, 4)], [tensor.view(-1)[1:5].view(1, 4)], 0, 0, 0, 32)
    assert unchanged(tensor)
    ops.swap_blocks([tensor], [tensor], [3, 2], [0, 1])
    assert tensor[3].tolist() == [0, 1]
    assert tensor[2].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((4, 0, 0, 8), IndexError, r"dst_row=4 is out of range \[0, 4\)"),
        ((0, -1, 0, 8), IndexError, "src_row=-1"),
        ((0, 1, 8, 9), ValueError, "nbytes=9 exceed the rows"),
        ((0, 1, -8, 8), ValueError, "offset=-8"),
        ((0, 1, 2**62, 2**62), ValueError, "exceed the rows"),
        ((0, 1, 0, -1), ValueError, "negative"),
    ],
)
def test_bad_rows(args, error, text):
    tensor = good()
    with pytest.raises(error, match=text):
        ops.copy_rows([tensor], [zeros(4, 2)], *args)
    assert unchanged(tensor)


def test_lists_must_fit_each_other():
    with pytest.raises(ValueError, match="dst has 1 tensors, but src 2"):
        ops.swap_blocks([good()], [good(), good()], [0], [0])
    with pytest.raises(ValueError, match="dst has rows of 16 bytes, but src of 24"):
        ops.swap_blocks([good()], [zeros(4, 3)], [0], [0])


def test_nothing_to_do():
    tensor = good()
    ops.copy_blocks([tensor], [], [])
    ops.copy_blocks([], [1], [2])
    ops.swap_blocks([], [], [], [])
    ops.copy_rows([], [], 0, 0, 0, 0)
    ops.copy_rows([tensor], [tensor], 1, 1, 0, 16)
    ops.copy_blocks([tensor], [2], [2])
    ops.copy_blocks([zeros(4, 0)], [1], [2])
    assert unchanged(tensor)


def test_non_blocking_is_done_on_return_in_host_memory():
    tensor, other = good().cpu(), torch.zeros(4, 2, dtype=torch.int64)
    ops.copy_blocks([tensor], [0], [3], non_blocking=True)
    ops.swap_blocks([other], [tensor], [1], [3], non_blocking=True)
    ops.copy_rows([other], [tensor], 2, 1, 0, 8, non_blocking=True)
    assert tensor[3].tolist() == [0, 1]
    assert other.tolist() == [[0, 0], [0, 1], [2, 0], [0, 0]]
    assert len(streams.in_flight) == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("step", [1, 2])
def test_as_ids_wakes_no_threads_of_torch(dtype: torch.dtype, step: int):
    """From 32768 elements on torch's operations are split over threads, which spin."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.copy_.default or func is torch.ops.aten._to_copy.default:
                sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    given = torch.arange(200_001, dtype=dtype)[::step]
    with Sizes():
        copied = ops.as_ids(given)
    assert copied.dtype is torch.int64
    assert copied.data_ptr() != given.data_ptr()
    assert torch.equal(copied, given.long())
    assert sum(sizes) == len(given)
    assert max(sizes) < 32768


def test_as_ids_is_a_copy_that_nobody_else_can_change():
    ids = torch.tensor([1, 2])
    mine = ops.as_ids(ids)
    ids[0] = 9
    assert mine.tolist() == [1, 2]
    assert ops.as_ids(ids.to(torch.int32)).dtype == torch.int64
    assert ops.as_ids((1, 2)).tolist() == [1, 2]
    assert ops.as_ids(range(3)).tolist() == [0, 1, 2]
    assert ops.as_ids([]).shape == (0,)


def test_strided_ids_and_version_counter():
    tensor = good()
    version = tensor._version
    ops.copy_blocks([tensor], torch.tensor([0, 9, 1, 9])[::2], torch.tensor([2, 9, 3, 9])[::2])
    assert tensor.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert tensor._version > version


OPS = torch.ops.llm_datadist_torch
SAMPLES = {
    "copy_blocks": lambda: ([good(), good()], torch.tensor([0, 1]), torch.tensor([1, 2])),
    "swap_blocks": lambda: ([good()], [good()], torch.tensor([0, 1]), torch.tensor([1, 2])),
    "copy_rows": lambda: ([good()], [good()], 0, 1, 8, 8),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("options", [{}, {"non_blocking": True}], ids=["", "non_blocking"])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(name, options):
    torch.library.opcheck(getattr(OPS, name).default, SAMPLES[name](), options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    def step(x, src, dst):
        ops.copy_blocks([x], src, dst)
        return x + 1

    x, expected = good(), good()
    src, dst = torch.tensor([0, 1]), torch.tensor([1, 0])
    result = torch.compile(step, fullgraph=True, backend=backend)(x, src, dst)
    expected[[1, 0]] = expected[[0, 1]]
    assert torch.equal(x, expected)
    assert torch.equal(result, expected + 1)


@pytest.mark.thorough
def test_the_gil_is_released():
    """A counter thread advances while each entry copies (own process: the switch is global)."""
    code = """
        import sys, threading, torch
        from llm_datadist_torch import _C
        from llm_datadist_torch.movement import ops
        sys.setswitchinterval(1000)  # a thread that holds the GIL keeps it
        torch.set_num_threads(1)
        a = torch.ones(64, 4 << 20, dtype=torch.uint8)
        b = torch.zeros(64, 4 << 20, dtype=torch.uint8)
        runs = torch.tensor([[0, 0, a.numel()]])
        bases = ops.as_ids([a.data_ptr()]), ops.as_ids([b.data_ptr()])
        half = list(range(32)), list(range(32, 64))
        inside = threading.Event()
        for call in (
            lambda: ops.copy_blocks([a], *half),
            lambda: ops.swap_blocks([b], [a], *half),
            lambda: ops.copy_rows([b.view(1, -1)], [a.view(1, -1)], 0, 0, 0, a.numel()),
            lambda: _C.copy_runs(*bases, runs),
        ):
            started, stop, count = threading.Event(), threading.Event(), [0]
            def spin():
                started.wait()
                while not stop.is_set():
                    count[0] += 1
                    stop.wait(0.001)  # lets the copying thread have the GIL back
            thread = threading.Thread(target=spin, daemon=True)
            thread.start()
            started.set()
            before = count[0]
            for _ in range(3):
                call()
            during = count[0] - before
            stop.set()
            thread.join()
            print(during)
            assert during > 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr

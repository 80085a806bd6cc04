# SPDX-License-Identifier: Apache-2.0
"""The arena against a slow, obvious model, and the life time of what it hands out."""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import _C
from llm_datadist_torch.memory.arena import ArenaMemory, ArenaStats
from llm_datadist_torch.values.status import LLMOutOfMemoryError, LLMParamError, LLMStatusCode

PAGE_SHIFT = 10
PAGE = 1 << PAGE_SHIFT


def take(
    arena: _C.Arena, count: int, shape: list[int], dtype: torch.dtype
) -> list[torch.Tensor] | None:
    """Tensors that alone keep their spans; None where they don't fit."""
    spans = arena.spans(count, math.prod(shape) * dtype.itemsize)
    if spans is None:
        return None
    return [span.tensor(shape, dtype, _C.MoveFlag()) for span in spans]


class ModelArena:
    """One byte per page; free spans are found by looking."""

    def __init__(self, pages: int) -> None:
        self.used = bytearray(pages)

    def free_spans(self) -> list[tuple[int, int]]:
        """(pages, start) of every maximal free span."""
        spans = []
        for used, group in itertools.groupby(range(len(self.used)), key=self.used.__getitem__):
            pages = list(group)
            if not used:
                spans.append((len(pages), pages[0]))
        return spans

    def allocate(self, count: int, pages: int) -> list[int] | None:
        before = bytes(self.used)
        starts = []
        for _ in range(count):
            fitting = [span for span in self.free_spans() if span[0] >= pages]
            if not fitting:
                self.used = bytearray(before)
                return None
            size, start = min(fitting)
            taken = start + size - pages
            self.used[taken : taken + pages] = b"\1" * pages
            starts.append(taken)
        return starts

    def release(self, start: int, pages: int) -> None:
        self.used[start : start + pages] = bytes(pages)

    def stats(self, spans_in_use: int) -> tuple[int, int, int, int]:
        sizes = [pages for pages, _ in self.free_spans()]
        return (
            len(self.used) * PAGE,
            sum(sizes) * PAGE,
            max(sizes, default=0) * PAGE,
            spans_in_use,
        )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 6), st.integers(1, 12 * PAGE)),
        st.tuples(st.just("release"), st.integers(0, 1000), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(pages=st.integers(1, 64), tail=st.integers(0, PAGE - 1), steps=operations)
def test_same_addresses_as_the_model(
    pages: int, tail: int, steps: list[tuple[str, int, int]]
) -> None:
    base = torch.empty(pages * PAGE + tail, dtype=torch.uint8)
    arena, model = _C.Arena(base, PAGE_SHIFT), ModelArena(pages)
    alive: list[tuple[torch.Tensor, int, int]] = []
    for what, number, nbytes in steps:
        if what == "allocate":
            each = -(-nbytes // PAGE)
            starts = model.allocate(number, each)
            tensors = take(arena, number, [nbytes], torch.uint8)
            assert (tensors is None) == (starts is None)
            if tensors is not None and starts is not None:
                offsets = [t.data_ptr() - base.data_ptr() for t in tensors]
                assert offsets == [start * PAGE for start in starts]
                alive += [(t, s, each) for t, s in zip(tensors, starts, strict=True)]
            del tensors
        elif alive:
            tensor, start, each = alive.pop(number % len(alive))
            del tensor
            model.release(start, each)
        assert arena.stats() == model.stats(len(alive))
    while alive:
        alive.pop()
    assert arena.stats() == ModelArena(pages).stats(0)


def test_rollback_against_the_model_in_a_fragmented_arena() -> None:
    """Enough free pages, not in the right pieces: what was taken of the call must come back."""
    rng = random.Random(11)
    base = torch.empty(32 * PAGE, dtype=torch.uint8)
    arena, model = _C.Arena(base, PAGE_SHIFT), ModelArena(32)
    alive: list[tuple[torch.Tensor, int, int]] = []
    rolled_back = 0
    for _ in range(3000):
        if alive and rng.random() < 0.5:
            tensor, start, each = alive.pop(rng.randrange(len(alive)))
            del tensor
            model.release(start, each)
        else:
            count, each = rng.randint(1, 5), rng.randint(1, 5)
            sizes = [pages // each for pages, _ in model.free_spans()]
            starts = model.allocate(count, each)
            tensors = take(arena, count, [each * PAGE], torch.uint8)
            assert (tensors is None) == (starts is None)
            enough_pages = count * each * PAGE <= arena.stats()[1]
            rolled_back += starts is None and enough_pages and sum(sizes) > 0
            for tensor, start in zip(tensors or [], starts or [], strict=True):
                assert tensor.data_ptr() - base.data_ptr() == start * PAGE
                alive.append((tensor, start, each))
            tensors = tensor = None
        assert arena.stats() == model.stats(len(alive))
    assert rolled_back > 20


def make_arena(pages: int = 16) -> _C.Arena:
    return _C.Arena(torch.zeros(pages * PAGE, dtype=torch.uint8), PAGE_SHIFT)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_free_in_every_order(order: tuple[int, ...]) -> None:
    arena = make_arena()
    tensors: list[torch.Tensor | None] = list(take(arena, 4, [PAGE], torch.uint8) or [])
    for done, index in enumerate(order, start=1):
        tensors[index] = None
        assert arena.stats()[1] == (12 + done) * PAGE
        assert arena.stats()[3] == 4 - done
    assert arena.stats() == (16 * PAGE, 16 * PAGE, 16 * PAGE, 0)


def test_a_span_lives_as_long_as_any_reference_to_its_memory() -> None:
    arena = make_arena()
    (tensor,) = take(arena, 1, [4, PAGE // 4], torch.uint8) or []
    view, array = tensor[2:3], tensor.numpy()
    del tensor
    assert arena.stats()[3] == 1
    del view
    assert arena.stats()[3] == 1
    del array
    assert arena.stats()[3] == 0


def test_a_tensor_outlives_arena_and_region() -> None:
    arena = ArenaMemory(SimpleNamespace(memory_size=64 * PAGE, page_shift=PAGE_SHIFT))
    first, second = arena.allocate(2, (PAGE,), torch.uint8).tensors
    first.fill_(7)
    second.fill_(9)
    del arena
    gc.collect()
    assert bool((first == 7).all())
    del first
    assert bool((second == 9).all())


def test_tensors_are_apart_and_have_the_shape() -> None:
    arena = make_arena(64)
    tensors = take(arena, 8, [3, 5, 7], torch.float32) or []
    for index, tensor in enumerate(tensors):
        assert tensor.shape == (3, 5, 7)
        assert tensor.is_contiguous()
        tensor.fill_(index)
    assert [float(t.sum()) for t in tensors] == [105.0 * i for i in range(8)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 8


def test_tensors_made_in_inference_mode_can_be_written_outside_it() -> None:
    arena = make_arena()
    with torch.inference_mode():
        (tensor,) = take(arena, 1, [8], torch.float32) or []
    tensor.add_(1)
    assert not tensor.is_inference()


@pytest.mark.parametrize(("count", "nbytes"), [(0, 1), (-1, 1), (1, 0)])
def test_nonsense_is_refused(count: int, nbytes: int) -> None:
    arena = make_arena()
    with pytest.raises(ValueError, match="positive"):
        arena.spans(count, nbytes)
    assert arena.stats()[3] == 0


@pytest.mark.parametrize("shape", [[PAGE + 1], [0], [-1], [2**40, 2**40]])
def test_a_tensor_that_does_not_fit_its_span_is_refused(shape: list[int]) -> None:
    (span,) = make_arena().spans(1, PAGE) or []
    with pytest.raises(ValueError, match=r"the span has|positive|int64"):
        span.tensor(shape, torch.uint8, _C.MoveFlag())


@pytest.mark.parametrize("count", [17, 2**40, 2**62])
def test_a_count_that_cannot_fit_is_answered_at_once(count: int) -> None:
    assert take(make_arena(), count, [1], torch.uint8) is None


@pytest.mark.parametrize(
    ("base", "error"),
    [
        (torch.zeros(4096, dtype=torch.int8), TypeError),
        (torch.zeros(64, 64, dtype=torch.uint8), ValueError),
        (torch.zeros(8192, dtype=torch.uint8)[::2], ValueError),
        (torch.zeros(0, dtype=torch.uint8), ValueError),
    ],
)
def test_a_base_that_is_no_region_is_refused(base: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="region_base"):
        _C.Arena(base, PAGE_SHIFT)


def test_threads_share_an_arena() -> None:
    arena = make_arena(256)
    errors: list[str] = []

    def hammer(mark: int) -> None:
        rng = random.Random(mark)
        alive: list[torch.Tensor] = []
        for _ in range(400):
            tensors = take(arena, rng.randint(1, 3), [rng.randint(1, 4 * PAGE)], torch.uint8)
            for tensor in tensors or []:
                alive.append(tensor.fill_(mark))
            while len(alive) > 12 or (alive and tensors is None):
                tensor = alive.pop(rng.randrange(len(alive)))
                if not bool((tensor == mark).all()):
                    errors.append(f"thread {mark} found somebody else's bytes")
                del tensor
                tensors = []

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hammer, args=(mark,)) for mark in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert arena.stats() == (256 * PAGE, 256 * PAGE, 256 * PAGE, 0)


# -- ArenaMemory


def pool(memory_size: int, page_shift: int = 16) -> SimpleNamespace:
    return SimpleNamespace(memory_size=memory_size, page_shift=page_shift)


def test_the_reference_vector() -> None:
    memory = ArenaMemory(pool(4 << 16))
    kept = memory.allocate(4, (1 << 16,), torch.uint8)
    assert memory.stats == ArenaStats(4 << 16, 0, 0, 4)
    with pytest.raises(LLMOutOfMemoryError) as caught:
        memory.allocate(1, (1,), torch.uint8)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    del kept
    assert memory.stats == ArenaStats(4 << 16, 4 << 16, 4 << 16, 0)


def test_out_of_memory_says_asked_free_and_largest_and_changes_nothing() -> None:
    memory = ArenaMemory(pool(8 << 16))
    tensors = list(memory.allocate(8, (1 << 16,), torch.uint8).tensors)
    tensors.sort(key=torch.Tensor.data_ptr)
    for index in (5, 4, 1):  # two free pages in one piece, one elsewhere
        del tensors[index]
    before = memory.stats
    assert before == ArenaStats(8 << 16, 3 << 16, 2 << 16, 5)
    with pytest.raises(LLMOutOfMemoryError) as caught:
        memory.allocate(2, (100_000,), torch.uint8)
    assert memory.stats == before
    error = caught.value
    assert error.requested_bytes == 4 << 16
    assert (error.free_bytes, error.largest_free_bytes) == (3 << 16, 2 << 16)
    for part in ("2 tensors of 100000 bytes (2 pages", "(4 pages) in all", "(3 pages) free"):
        assert part in str(error)


def test_a_call_that_half_fits_leaves_every_counter_as_it_was() -> None:
    memory = ArenaMemory(pool(8 << 16))
    tensors = list(memory.allocate(8, (1 << 16,), torch.uint8).tensors)
    tensors.sort(key=torch.Tensor.data_ptr)
    for index in (6, 3, 2, 1):  # three free pages in one piece, one elsewhere
        del tensors[index]
    before = memory.stats
    assert before == ArenaStats(8 << 16, 4 << 16, 3 << 16, 4)
    with pytest.raises(LLMOutOfMemoryError):
        memory.allocate(2, (100_000,), torch.uint8)  # the first has room, the second hasn't
    assert memory.stats == before


def test_absurd_sizes_are_out_of_memory_too() -> None:
    memory = ArenaMemory(pool(4 << 16))
    with pytest.raises(LLMOutOfMemoryError):
        memory.allocate(1, (2**62, 2**62), torch.float32)


def test_caches_of_one_pool_share_one_region() -> None:
    memory = ArenaMemory(pool(64 << 16))
    one, other = (memory.allocate(2, (5,), torch.float32) for _ in range(2))
    assert one.region is other.region is memory.region
    for tensor in (*one.tensors, *other.tensors):
        offset = tensor.data_ptr() - memory.region.address
        assert offset % (1 << 16) == 0
        assert 0 <= offset < memory.region.nbytes


@pytest.mark.parametrize("page_shift", [9, 31])
def test_page_shift_out_of_range(page_shift: int) -> None:
    with pytest.raises(LLMParamError, match="page_shift"):
        ArenaMemory(pool(1 << 20, page_shift))


def test_a_page_larger_than_the_pool() -> None:
    with pytest.raises(LLMParamError, match="less than a page"):
        ArenaMemory(pool(1000, 10))


@pytest.mark.parametrize("memory_size", [0, 1 << 60])
def test_a_pool_that_cannot_be_had(memory_size: int) -> None:
    with pytest.raises(LLMOutOfMemoryError):
        ArenaMemory(pool(memory_size))


@pytest.mark.parametrize(("count", "shape"), [(0, (4,)), (1, (4, 0)), (1, (-4,))])
def test_pool_refuses_nonsense(count: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(LLMParamError, match=r"positive|at least 1"):
        ArenaMemory(pool(1 << 20)).allocate(count, shape, torch.uint8)


def test_a_cache_keeps_pages_that_torch_has_left() -> None:
    """A storage that was moved lets go of its span; the cache has it still."""
    memory = ArenaMemory(pool(1 << 20))
    allocation = memory.allocate(2, (1 << 16,), torch.uint8)
    allocation.tensors[0].share_memory_()
    assert memory.stats.spans_in_use == 2
    del allocation
    gc.collect()
    assert memory.stats.spans_in_use == 0

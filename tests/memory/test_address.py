# SPDX-License-Identifier: Apache-2.0
"""Wild, freed and half-mapped addresses; tensors that are not what a cache needs."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import map_pages, protect, unmap

from llm_datadist_torch import _C
from llm_datadist_torch.memory.address import (
    address_tensor,
    check_alive,
    describe_tensors,
    probe,
    tensor_over,
)
from llm_datadist_torch.values.status import LLMParamError

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")


def guarded_pages(count: int) -> int:
    """Pages alone in the world: one without access on either side.

    They are never unmapped: tests make holes, which may be somebody else's memory by then.
    """
    first = map_pages((count + 2) * PAGE)
    protect(first, PAGE, 0)
    protect(first + (count + 1) * PAGE, PAGE, 0)
    return first + PAGE


@pytest.fixture
def pages() -> int:
    return guarded_pages(8)


def probed(address: int, nbytes: int) -> tuple[int, str]:
    return _C.probe_extents(address_tensor([address]), nbytes)


def test_good_memory(pages: int) -> None:
    probe([pages], 8 * PAGE)
    probe([pages + 1, pages + 7 * PAGE], PAGE - 1)
    probe([pages + 8 * PAGE - 1], 1)
    check_alive([pages, pages + 5], 7 * PAGE)


def test_tensors_and_regions_are_good() -> None:
    tensor = torch.zeros(1000)
    region = _C.HostRegion.create(3 << 20)
    probe([tensor.data_ptr()], 4000)
    probe([region.address], 3 << 20)
    check_alive([tensor.data_ptr()], 4000)
    check_alive([region.address], 3 << 20)


def test_the_byte_after_the_last(pages: int) -> None:
    assert probed(pages, 8 * PAGE + 1) == (0, "not readable")
    assert probed(pages - 1, 2) == (0, "not readable")


@pytest.mark.parametrize(
    ("address", "nbytes", "reason"),
    [
        (0, 1, "address 0"),
        (1, 1, "not mapped"),
        (4096, 8, "not mapped"),
        (2**63, 8, "not mapped"),
        (2**64 - 1, 1, "not mapped"),
        (2**64 - 1, 2, "not mapped"),
        (2**64 - 4096, 2**62, "not mapped"),
    ],
)
def test_wild_addresses(address: int, nbytes: int, reason: str) -> None:
    assert probed(address, nbytes) == (0, reason)
    assert _C.check_mapped(address_tensor([address]), nbytes) == 0
    with pytest.raises(LLMParamError, match=rf"addrs\[0\]={address:#x}: {reason}"):
        probe([address], nbytes)
    with pytest.raises(LLMParamError, match=rf"addrs\[0\]={address:#x}"):
        check_alive([address], nbytes)


def test_an_extent_that_wraps_around_is_not_mapped(pages: int) -> None:
    assert probed(pages, 2**63 - 1) == (0, "not readable")
    assert _C.check_mapped(address_tensor([pages]), 2**63 - 1) == 0


def test_freed_memory() -> None:
    address = map_pages(4 * PAGE)
    probe([address], 4 * PAGE)
    unmap(address, 4 * PAGE)
    assert probed(address, 4 * PAGE) == (0, "not mapped")
    with pytest.raises(LLMParamError, match="no longer mapped"):
        check_alive([address], 1)


def test_a_hole_in_the_middle(pages: int) -> None:
    unmap(pages + 3 * PAGE, PAGE)
    assert probed(pages, 8 * PAGE) == (0, "not mapped")
    assert probed(pages, 3 * PAGE) == (-1, "")
    assert probed(pages, 3 * PAGE + 1) == (0, "not mapped")
    assert probed(pages + 4 * PAGE, 4 * PAGE) == (-1, "")
    extents = address_tensor([pages, pages + 4 * PAGE])
    assert _C.check_mapped(extents, 3 * PAGE) == -1
    assert _C.check_mapped(extents.flip(0), 3 * PAGE + 1) == 1


def test_a_read_only_page(pages: int) -> None:
    protect(pages + 7 * PAGE, PAGE, mmap.PROT_READ)
    assert probed(pages, 8 * PAGE) == (0, "not writable")
    assert probed(pages, 7 * PAGE) == (-1, "")
    with pytest.raises(LLMParamError, match="not writable"):
        probe([pages + 7 * PAGE], 1)


def test_mixed_permissions_side_by_side_are_one_good_extent(pages: int) -> None:
    protect(pages + 2 * PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    assert probed(pages, 8 * PAGE) == (-1, "")


def test_the_first_bad_one_is_named(pages: int) -> None:
    with pytest.raises(LLMParamError, match=r"addrs\[2\]=0x5: not mapped.*Remedy: .*data_ptr"):
        probe([pages, pages + PAGE, 5, 0], PAGE)


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_ints_that_are_no_addresses(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"addrs\[1\]={bad}"):
        probe([4096, bad], 1)


@pytest.mark.parametrize("nbytes", [0, -1])
@pytest.mark.parametrize("call", [probe, check_alive])
def test_sizes_that_are_none(call: Callable[[list[int], int], None], nbytes: int) -> None:
    with pytest.raises(ValueError, match="nbytes"):
        call([4096], nbytes)


@pytest.mark.parametrize(
    "addrs", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(5)]
)
def test_the_native_side_refuses_other_tensors(addrs: torch.Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="addrs"):
        _C.probe_extents(addrs, 1)


# -- tensor_over


def test_a_tensor_over_an_address_is_that_memory() -> None:
    owner = torch.arange(24, dtype=torch.int32)
    tensor = tensor_over(owner.data_ptr(), (4, 6), torch.int32)
    assert torch.equal(tensor, owner.view(4, 6))
    tensor[1, 0] = 99
    assert owner[6] == 99
    del tensor
    assert owner[6] == 99


@pytest.mark.parametrize(
    ("offset", "shape"), [(1, (1,)), (0, (0,)), (0, (-1,)), (0, (2**40, 2**40))]
)
def test_what_cannot_be_a_tensor(offset: int, shape: tuple[int, ...]) -> None:
    owner = torch.zeros(4)
    with pytest.raises(LLMParamError, match=f"{owner.data_ptr() + offset:#x}"):
        tensor_over(owner.data_ptr() + offset, shape, torch.float32)


def test_no_tensor_over_address_0() -> None:
    with pytest.raises(LLMParamError, match="0x0"):
        tensor_over(0, (1,), torch.uint8)


# -- describe_tensors

SHAPE = (6, 4, 8)
ROW = 4 * 8 * 4


def describe(*tensors: object) -> tuple[torch.Tensor, int]:
    return describe_tensors(tensors, SHAPE, torch.float32, CPU)  # type: ignore[arg-type]


def test_plain_tensors() -> None:
    tensors = [torch.zeros(SHAPE) for _ in range(3)]
    addrs, row_stride_bytes = describe(*tensors)
    assert addrs.tolist() == [t.data_ptr() for t in tensors]
    assert row_stride_bytes == ROW


def test_another_shape_of_as_many_elements() -> None:
    assert describe(torch.zeros(6 * 4 * 8), torch.zeros(2, 3, 32))[1] == ROW


def test_strided_rows() -> None:
    base = torch.zeros(12, 4, 8)
    assert describe(base[::2])[1] == 2 * ROW


def test_interleaved_keys_and_values_do_not_overlap() -> None:
    kv = torch.zeros(6, 2, 4, 8)
    addrs, row_stride_bytes = describe(kv[:, 0], kv[:, 1])
    assert row_stride_bytes == 2 * ROW
    assert int(addrs[1] - addrs[0]) == ROW


def test_one_row_has_the_stride_of_a_row() -> None:
    base = torch.zeros(2, 3, 4, 8)
    _, row_stride_bytes = describe_tensors(
        [base[0, :1], base[1, 2:]], (1, 4, 8), torch.float32, CPU
    )
    assert row_stride_bytes == ROW


def test_a_dimension_of_one_may_have_any_stride() -> None:
    odd = torch.zeros(6 * 32).as_strided((6, 1, 32), (32, 7777, 1))
    assert describe_tensors([odd], (6, 1, 32), torch.float32, CPU)[1] == 128


def test_a_leaf_that_requires_grad_is_fine() -> None:
    assert describe(torch.zeros(SHAPE, requires_grad=True))[1] == ROW


_KV = torch.zeros(6, 2, 4, 8)
_FLAT = torch.zeros(400)
BAD = {
    "none at all": ((), "no tensors"),
    "not a tensor": ((torch.zeros(SHAPE), 5), r"tensors\[1\] is a int"),
    "None": ((None,), r"tensors\[0\] is a NoneType"),
    "dtype": ((torch.zeros(SHAPE, dtype=torch.int32),), "dtype torch.int32.*torch.float32"),
    "shape": ((torch.zeros(6, 4, 9),), r"shape \[6, 4, 9\].*\[6, 4, 8\]"),
    "strided of another shape": ((torch.zeros(6, 4, 16)[..., ::2].transpose(1, 2),), "shape"),
    "device": ((torch.zeros(SHAPE, device="meta"),), "on meta.*on cpu"),
    "rows not contiguous": ((torch.zeros(6, 8, 4).transpose(1, 2),), "rows are not contiguous"),
    "gaps inside rows": ((torch.zeros(6, 4, 16)[..., ::2],), "rows are not contiguous"),
    "expanded rows": ((torch.zeros(1, 4, 8).expand(SHAPE),), "stride 0"),
    "rows over each other": ((_FLAT.as_strided(SHAPE, (16, 8, 1)),), "rows overlap"),
    "expanded inside": ((torch.zeros(6, 1, 8).expand(SHAPE),), "rows are not contiguous"),
    "different strides": ((torch.zeros(SHAPE), _KV[:, 0]), r"tensors\[1\] has 256 .* has 128"),
    "the same twice": ((_KV[:, 0], _KV[:, 1], _KV[:, 0]), r"tensors\[0\].*tensors\[2\].*overlap"),
    "half a row later": (
        (_FLAT.as_strided(SHAPE, (32, 8, 1)), _FLAT.as_strided(SHAPE, (32, 8, 1), 16)),
        "overlap",
    ),
    "sparse": ((torch.zeros(SHAPE).to_sparse(),), "torch.sparse_coo"),
    "negated view": ((torch._neg_view(torch.zeros(SHAPE)),), "negated"),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_are_refused(name: str) -> None:
    tensors, match = BAD[name]
    with pytest.raises(LLMParamError, match=match):
        describe(*tensors)


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_quantized_tensors_are_refused() -> None:
    tensor = torch._empty_affine_quantized(list(SHAPE), scale=1.0, zero_point=0, dtype=torch.quint8)
    with pytest.raises(LLMParamError, match="quantized"):
        describe_tensors([tensor], SHAPE, torch.quint8, CPU)


def test_misaligned_memory_is_refused() -> None:
    storage = torch.zeros(6 * ROW + 4, dtype=torch.uint8)
    odd = torch.frombuffer(storage.numpy(), dtype=torch.float32, count=192, offset=1)
    with pytest.raises(LLMParamError, match="aligned"):
        describe(odd.view(SHAPE))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 6),
    row=st.integers(1, 8),
    gap=st.integers(0, 20),
    starts=st.lists(st.integers(0, 150), min_size=1, max_size=6),
)
def test_overlap_is_exact(rows: int, row: int, gap: int, starts: list[int]) -> None:
    base = torch.zeros(400, dtype=torch.uint8)
    row_stride_bytes = row + gap
    tensors = [base.as_strided((rows, row), (row_stride_bytes, 1), start) for start in starts]
    owned = [
        {start + r * row_stride_bytes + i for r in range(rows) for i in range(row)}
        for start in starts
    ]
    disjoint = sum(map(len, owned)) == len(set().union(*owned))
    if disjoint:
        addrs, _ = describe_tensors(tensors, (rows, row), torch.uint8, CPU)
        assert (addrs - base.data_ptr()).tolist() == starts
    else:
        with pytest.raises(LLMParamError, match="overlap"):
            describe_tensors(tensors, (rows, row), torch.uint8, CPU)


def test_the_probe_agrees_with_a_random_layout_of_pages() -> None:
    rng = random.Random(5)
    kinds = {0: "not readable", 1: "not writable", 3: ""}
    for _ in range(30):
        first = guarded_pages(16)
        page_kinds = [rng.choice([0, 1, 3, 3, 3, None]) for _ in range(16)]
        for index, kind in enumerate(page_kinds):
            if kind is None:
                unmap(first + index * PAGE, PAGE)
            else:
                protect(first + index * PAGE, PAGE, kind)
        for _ in range(20):
            start = rng.randrange(16 * PAGE)
            nbytes = rng.randint(1, 16 * PAGE - start)
            touched = page_kinds[start // PAGE : (start + nbytes - 1) // PAGE + 1]
            faults = ["not mapped" if kind is None else kinds[kind] for kind in touched]
            expected = next((fault for fault in faults if fault), "")
            assert probed(first + start, nbytes) == (0 if expected else -1, expected)
            mapped = _C.check_mapped(address_tensor([first + start]), nbytes)
            assert mapped == (0 if None in touched else -1)

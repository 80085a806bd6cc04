# SPDX-License-Identifier: Apache-2.0
"""Cache.create_cpu_cache: what memory it takes, and what it refuses (reference API, 7.3)."""

from __future__ import annotations

import ctypes
import gc
import mmap
import random

import pytest
import torch

from llm_datadist_torch import Cache, CacheDesc, DataType, LLMParamError, Placement
from tests.api.support import (
    PI,
    desc,
    host,
    map_pages,
    protect,
    raises,
    raw,
    scramble,
    tensors_of,
    unmap,
)

PAGE = mmap.PAGESIZE
TORCH_TYPES = [t for t in DataType if t is not DataType.DT_STRING]


X = host(2)


def two() -> list[torch.Tensor]:
    return tensors_of(X)


BAD_CPU = [
    # in order: type of the desc, type of addrs, placement, count
    ("x", [1], TypeError),
    ("x", (1,), TypeError),
    (None, (1,), TypeError),
    (None, [1], AttributeError),
    (desc(), (1, 2), TypeError),
    (desc(), None, TypeError),
    (desc(), torch.zeros(2, 4, 8, dtype=torch.int32), TypeError),
    (desc(), ["1"], TypeError),
    (desc(), [1.0], TypeError),
    (desc(), [True, 2], TypeError),
    (desc(), [1, False], TypeError),
    (desc(), [None], TypeError),
    (desc(), [-1], ValueError),
    (desc(), [2**64], ValueError),
    (desc(), [1], PI),
    (X, [], PI),
    (X, [1], PI),
    (X, [1, 2, 3], PI),
    (host(0), [], PI),
    (host(2, (0, 8)), [1, 2], PI),
    (host(2, (-1, 8)), [1, 2], PI),
    (host(2, (1,) * 32), [1, 2], PI),
    (host(2, (2**62, 2**62)), [1, 2], PI),
    (CacheDesc(2, [4, 8], None, Placement.HOST), [1, 2], TypeError),
    (CacheDesc(2, [4, 8], DataType.DT_INT8, None), [1, 2], PI),
]


@pytest.mark.parametrize(("description", "addrs", "fault"), BAD_CPU)
def test_create_cpu_cache_refuses(description, addrs, fault):
    with raises(fault):
        Cache.create_cpu_cache(description, addrs)


def test_mixed_ints_and_tensors_are_refused():
    x, y = two()
    for mixed in ([x, y.data_ptr()], [y.data_ptr(), x], [x, None], [x, True]):
        with raises(TypeError, r"addrs\[1\]"):
            Cache.create_cpu_cache(X, mixed)


@pytest.mark.parametrize("form", ["ints", "tensors"])
def test_create_cpu_cache(form):
    mine = two()
    given = mine if form == "tensors" else [t.data_ptr() for t in mine]
    cache = Cache.create_cpu_cache(X, given)
    assert cache.cache_id == -1
    assert cache.is_blocks_cache
    assert cache.is_unowned == (form == "ints")
    assert cache.tensor_addrs == [t.data_ptr() for t in mine]
    cache.tensors[1][2].fill_(5)
    assert bool((mine[1][2] == 5).all())
    given.clear()
    assert len(cache.tensors) == 2


def test_deallocate_of_a_cpu_cache(instance_factory):
    manager = instance_factory().cache_manager
    cache = Cache.create_cpu_cache(X, two())
    with raises(PI):
        manager.deallocate_cache(cache)
    assert len(cache.tensor_addrs) == 2
    manager.deallocate_blocks_cache(cache)
    assert cache.tensor_addrs == []
    manager.deallocate_blocks_cache(cache)


NBYTES = 4 * 8 * 4


def refused(addrs: list[int], index: int, nbytes: int = NBYTES) -> str:
    """Both ways to bring addresses must refuse; returns the message."""
    description = CacheDesc(len(addrs), [1, nbytes], DataType.DT_INT8, Placement.HOST)
    with raises(PI, rf"addrs\[{index}\]=0x{addrs[index]:x}") as _:
        Cache.create_cpu_cache(description, addrs)
    with pytest.raises(LLMParamError) as caught:
        Cache.create_cpu_cache(description, addrs)
    return str(caught.value)


WILD = [
    1,
    8,
    0xDEADBEEF,
    0x10000,
    2**40 + 5,
    2**47 - PAGE,
    2**47,
    2**48,
    2**63 - 8,
    2**63,
    0xFFFF800000000000,
    0xFFFFFFFFFF600000,  # vsyscall
    2**64 - 4096,
    2**64 - 1,
]


@pytest.mark.parametrize("address", [0, *WILD], ids=hex)
@pytest.mark.parametrize("index", [0, 1])
def test_wild_addresses_are_refused(address, index):
    good = torch.zeros(NBYTES, dtype=torch.int8)
    addrs = [good.data_ptr(), address] if index else [address, good.data_ptr()]
    refused(addrs, index)


def test_random_addresses_never_crash():
    chance = random.Random(5)
    for _ in range(300):
        address = chance.getrandbits(chance.choice([32, 47, 48, 64]))
        nbytes = chance.choice([1, 64, 4096, 1 << 30])
        description = CacheDesc(1, [1, nbytes], DataType.DT_INT8, Placement.HOST)
        with raises(PI):  # this process is small: to hit it by chance is out of the question
            Cache.create_cpu_cache(description, [address])


def test_freed_address_is_refused():
    address = map_pages(4 * PAGE)
    description = CacheDesc(1, [4, PAGE], DataType.DT_INT8, Placement.HOST)
    cache = Cache.create_cpu_cache(description, [address])
    cache.tensors[0].fill_(3)
    unmap(address, 4 * PAGE)
    refused([address], 0, 4 * PAGE)


def test_half_mapped_address_is_refused():
    address = map_pages(4 * PAGE)
    unmap(address + 3 * PAGE, PAGE)
    refused([address], 0, 4 * PAGE)
    refused([address + 100], 0, 3 * PAGE)
    whole = CacheDesc(1, [3, PAGE], DataType.DT_INT8, Placement.HOST)
    assert Cache.create_cpu_cache(whole, [address]).tensor_addrs == [address]
    unmap(address, 3 * PAGE)


@pytest.mark.parametrize("protection", [0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_EXEC])
def test_memory_that_cannot_be_written_is_refused(protection):
    address = map_pages(4 * PAGE)
    protect(address + 2 * PAGE, PAGE, protection)
    refused([address], 0, 4 * PAGE)
    unmap(address, 4 * PAGE)


def test_read_only_mapping_of_a_file_is_refused():
    code = ctypes.cast(ctypes.CDLL(None).munmap, ctypes.c_void_p).value
    refused([code], 0, 8)


def test_misaligned_address_is_refused():
    tensor = torch.zeros(100, dtype=torch.int32)
    with raises(PI):
        Cache.create_cpu_cache(host(1, (4, 8)), [tensor.data_ptr() + 2])


@pytest.mark.parametrize("shift", [0, 4, 64, NBYTES - 4, -4, -(NBYTES - 4)])
@pytest.mark.parametrize("form", ["ints", "tensors"])
def test_overlap_is_refused(shift, form):
    base = torch.zeros(1000, dtype=torch.int32)
    one = base[400 : 400 + 32].view(4, 8)
    other = base[400 + shift // 4 : 432 + shift // 4].view(4, 8)
    given = [one, other] if form == "tensors" else [one.data_ptr(), other.data_ptr()]
    with raises(PI, "overlap"):
        Cache.create_cpu_cache(X, given)


@pytest.mark.parametrize("form", ["ints", "tensors"])
def test_neighbours_are_fine(form):
    base = torch.zeros(64, dtype=torch.int32)
    given = [base[32:].view(4, 8), base[:32].view(4, 8)]
    given = given if form == "tensors" else [t.data_ptr() for t in given]
    assert len(Cache.create_cpu_cache(X, given).tensors) == 2


BAD_TENSORS = [
    ("dtype", lambda: torch.zeros(4, 8, dtype=torch.float32)),
    ("shape", lambda: torch.zeros(4, 9, dtype=torch.int32)),
    ("rows", lambda: torch.zeros(3, 8, dtype=torch.int32)),
    ("transposed", lambda: torch.zeros(8, 4, dtype=torch.int32).t()),
    ("strided rows", lambda: torch.zeros(4, 16, dtype=torch.int32)[:, ::2]),
    ("expanded", lambda: torch.zeros(1, 8, dtype=torch.int32).expand(4, 8)),
    ("overlapping rows", lambda: torch.zeros(64, dtype=torch.int32).as_strided((4, 8), (4, 1))),
    ("reversed contiguity", lambda: torch.zeros(2, 16, dtype=torch.int32).t()[:, :1]),
    ("sparse", lambda: torch.zeros(4, 8, dtype=torch.int32).to_sparse()),
    ("meta", lambda: torch.zeros(4, 8, dtype=torch.int32, device="meta")),
    ("empty", lambda: torch.zeros(0, 8, dtype=torch.int32)),
]


@pytest.mark.parametrize(("name", "make"), BAD_TENSORS, ids=[n for n, _ in BAD_TENSORS])
@pytest.mark.parametrize("index", [0, 1])
def test_bad_tensors_are_refused(name, make, index):
    given = two()
    given[index] = make()
    with raises(PI, rf"tensors\[{index}\]"):
        Cache.create_cpu_cache(X, given)


def test_unequal_strides_are_refused():
    wide = torch.zeros(4, 16, dtype=torch.int32)[:, :8]
    with raises(PI, r"tensors\[1\]"):
        Cache.create_cpu_cache(X, [*two()[:1], wide])


def test_contiguous_tensors_of_another_shape_are_taken_in_the_shape_of_the_desc():
    mine = [torch.arange(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32).view(2, 16)]
    cache = Cache.create_cpu_cache(X, mine)
    assert [list(t.shape) for t in cache.tensors] == [[4, 8], [4, 8]]
    assert cache.tensors[1][3].tolist() == list(range(24, 32))


def test_strided_views():
    base = torch.zeros(4, 2, 8, dtype=torch.int32)
    cache = Cache.create_cpu_cache(X, [base[:, 0], base[:, 1]])
    assert (cache.layout.row_bytes, cache.layout.row_stride_bytes) == (32, 64)
    assert cache.nbytes == 2 * NBYTES
    cache.block(2)[1].fill_(6)
    assert bool((base[2, 1] == 6).all())
    assert int(base.sum()) == 48


def test_tensors_are_kept_alive_when_the_user_forgets_them():
    mine = two()
    scramble(mine, 4)
    before = [raw(t) for t in mine]
    cache = Cache.create_cpu_cache(X, mine)
    addrs = cache.tensor_addrs
    del mine
    gc.collect()
    noise = [torch.full((4, 8), 77, dtype=torch.int32) for _ in range(2000)]
    assert [raw(t) for t in cache.tensors] == before
    assert not {t.data_ptr() for t in noise} & set(addrs)


def test_tensors_that_require_grad_are_taken_without_it():
    weight = torch.zeros(4, 8, requires_grad=True)
    cache = Cache.create_cpu_cache(host(1, dtype=DataType.DT_FLOAT), [weight])
    cache.tensors[0].fill_(2)
    assert not cache.tensors[0].requires_grad
    assert weight.requires_grad
    assert float(weight.detach().sum()) == 64


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("form", ["ints", "tensors"])
def test_all_data_types(dtype, form):
    description = host(2, dtype=dtype)
    mine = tensors_of(description)
    given = mine if form == "tensors" else [t.data_ptr() for t in mine]
    cache = Cache.create_cpu_cache(description, given)
    assert {t.dtype for t in cache.tensors} == {description.torch_dtype}
    assert cache.nbytes == sum(t.nbytes for t in mine)
    scramble(cache.tensors, 1)
    assert [raw(t) for t in mine] == [raw(t) for t in cache.tensors]


def test_strings_are_bytes():
    """torch has no such type: an element is 16 bytes, one more dimension."""
    description = host(1, dtype=DataType.DT_STRING)
    memory = torch.zeros(4, 8, 16, dtype=torch.uint8)
    for given in ([memory], [memory.data_ptr()]):
        cache = Cache.create_cpu_cache(description, given)
        assert cache.nbytes == 4 * 8 * 16
        assert cache.layout.row_bytes == 128
        assert cache.tensors[0].dtype == torch.uint8
    with raises(PI):
        Cache.create_cpu_cache(description, [memory.data_ptr(), 1])


def test_the_callers_desc_is_shared_and_unchanged():
    shape = [4, 8]
    description = host(2, shape)
    before = repr(description), dict(vars(description))
    cache = Cache.create_cpu_cache(description, two())
    assert cache.cache_desc is description
    assert description.shape is shape
    assert (repr(description), vars(description)) == before

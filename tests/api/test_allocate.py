# SPDX-License-Identifier: Apache-2.0
"""allocate, deallocate, remove_cache_key: order of checks, geometry, memory (8.1, 8.2 and 9.1)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    Placement,
)
from tests.api.support import (
    INVALID,
    OOM,
    PAGE,
    PI,
    counters,
    desc,
    host,
    page_desc,
    pool_stats,
    raises,
    regions,
    tensors_of,
)
from tests.devices import on_npu

K = CacheKey(1, 1)


# -- order of checks (9.1) ------------------------------------------------------------------------

TOO_BIG = desc(1, (4, 2**50), DataType.DT_INT8)

CALLS = [
    # 1 desc type, 2 keys type
    ("allocate_cache", ("x", None), TypeError),
    ("allocate_cache", ("x",), TypeError),
    ("allocate_cache", (None, None), TypeError),
    ("allocate_cache", (None,), AttributeError),
    ("allocate_cache", (desc(0), None), TypeError),
    ("allocate_cache", (desc(0), {K}), TypeError),
    ("allocate_cache", (desc(0), K), TypeError),
    ("allocate_cache", (desc(0), [None]), TypeError),
    ("allocate_cache", (desc(0), [BlocksCacheKey(1)]), TypeError),
    ("allocate_cache", (desc(0), [CacheKeyByIdAndIndex(1, 1)]), TypeError),
    ("allocate_blocks_cache", ("x", 1), TypeError),
    ("allocate_blocks_cache", (None, 1), TypeError),
    ("allocate_blocks_cache", (None,), AttributeError),
    ("allocate_blocks_cache", (desc(0), K), TypeError),
    ("allocate_blocks_cache", (desc(0), [BlocksCacheKey(1)]), TypeError),
    # 3 num_tensors
    ("allocate_cache", (desc(0),), (PI, "num_tensors=0")),
    ("allocate_cache", (desc(0, (0, 8)),), (PI, "num_tensors=0")),
    ("allocate_blocks_cache", (desc(0),), (PI, "num_tensors=0")),
    # 5 shape
    ("allocate_cache", (desc(1, (1,) * 32),), (PI, "32 dimensions")),
    ("allocate_cache", (desc(1, (0, 8)),), (PI, "shape")),
    ("allocate_cache", (desc(1, (8, 0)),), (PI, "shape")),
    ("allocate_cache", (desc(1, (8, -1)),), (PI, "shape")),
    ("allocate_cache", (desc(1, (2**40, 2**40)),), (PI, "int64")),
    ("allocate_cache", (desc(1, (2**62,), DataType.DT_INT32),), (PI, "int64")),
    ("allocate_cache", (CacheDesc(1, [2, 2], None),), PI),
    ("allocate_cache", (CacheDesc(1, [2, 2], DataType.DT_INT8, None),), (PI, "placement")),
    ("allocate_blocks_cache", (desc(1, (0, 8)),), (PI, "shape")),
    ("allocate_blocks_cache", (desc(1, (1,) * 32),), (PI, "32 dimensions")),
    ("allocate_cache", (desc(1, (0, 8)), [K, K]), (PI, "shape")),
    # 6 memory, before 7 keys
    ("allocate_cache", (TOO_BIG,), OOM),
    ("allocate_cache", (TOO_BIG, [K, K]), OOM),
    ("allocate_blocks_cache", (TOO_BIG,), OOM),
    ("allocate_cache", (desc(2**32 - 1),), OOM),
    # 7 keys
    ("allocate_cache", (desc(), [CacheKey(1, r) for r in range(5)]), (PI, "5 cache_keys")),
    ("allocate_cache", (desc(), [CacheKey(1, INVALID)] * 5), (PI, "5 cache_keys")),
    ("allocate_cache", (desc(), [K, CacheKey(2, 1)]), (PI, "repeats")),
    ("allocate_cache", (desc(), (CacheKey(1, 1), CacheKey(1, 1))), (PI, "repeats")),
    ("allocate_cache", (desc(), [CacheKey(1, 77)]), (PI, "bound")),
    ("allocate_blocks_cache", (desc(), BlocksCacheKey(1, 77)), (PI, "bound")),
    # create_host_cache (ours)
    ("create_host_cache", (None,), TypeError),
    ("create_host_cache", (desc(),), (PI, "HOST")),
    ("create_host_cache", (host(0),), (PI, "num_tensors")),
    # deallocate: type, then kind
    ("deallocate_cache", (None,), TypeError),
    ("deallocate_cache", (1,), TypeError),
    ("deallocate_blocks_cache", (None,), TypeError),
    # remove_cache_key
    ("remove_cache_key", (None,), TypeError),
    ("remove_cache_key", (1,), TypeError),
    ("remove_cache_key", (BlocksCacheKey(1),), TypeError),
    ("remove_cache_key", (CacheKeyByIdAndIndex(1, 1),), TypeError),
]


@pytest.mark.parametrize("pool", [None, 4 * PAGE])
@pytest.mark.parametrize(("method", "arguments", "fault"), CALLS)
def test_call_refused_and_nothing_changed(instance_factory, method, arguments, fault, pool):
    datadist = instance_factory(pool=pool)
    manager = datadist.cache_manager
    manager.register_cache(desc(), tensors_of(desc()), [CacheKey(1, 77)])
    manager.register_blocks_cache(desc(), tensors_of(desc()), BlocksCacheKey(1, 77))
    before = counters(datadist)
    fault, text = fault if isinstance(fault, tuple) else (fault, None)
    with raises(fault, text):
        getattr(manager, method)(*arguments)
    assert counters(datadist) == before


@pytest.mark.parametrize("paged", [False, True])
def test_kind_must_match(instance_factory, paged):
    manager = instance_factory().cache_manager
    makers = [manager.allocate_cache, manager.allocate_blocks_cache]
    enders = [manager.deallocate_cache, manager.deallocate_blocks_cache]
    cache = makers[paged](desc())
    with raises(PI):
        enders[not paged](cache)
    assert len(cache.tensors) == 2
    enders[paged](cache)
    with raises(PI):  # also when it has ended
        enders[not paged](cache)


def test_failed_calls_may_be_repeated_while_the_error_is_looked_at(instance_factory):
    """The traceback of an error must not hold the memory of the failed cache."""
    datadist = instance_factory(pool=4 * PAGE)
    manager = datadist.cache_manager
    with pytest.raises(LLMException) as caught:
        manager.allocate_cache(page_desc(4), [K, K])
    assert pool_stats(datadist).spans_in_use == 0
    assert manager.allocate_cache(page_desc(4), [K])
    assert caught.value.__traceback__ is not None


def test_deallocate_of_another_instances_cache(instance_factory):
    one, other = (instance_factory().cache_manager for _ in range(2))
    mine, yours = one.allocate_cache(desc()), other.allocate_cache(desc())
    with raises(PI):
        one.deallocate_cache(yours)
    assert len(mine.tensors) == len(yours.tensors) == 2


# -- geometry (8.1), ids (8.2) --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "size", "row_bytes", "rows"),
    [
        (CacheDesc(4, [2, 8], DataType.DT_FLOAT16), 32, 16, 2),
        (CacheDesc(1, [7], DataType.DT_INT64), 56, 8, 7),
        (CacheDesc(1, [3, 5, 7, 2], DataType.DT_BF16), 420, 140, 3),
        (CacheDesc(1, [3, 5], DataType.DT_INT8, batch_dim_index=1), 15, 5, 3),
        (CacheDesc(1, [2] + [1] * 30, DataType.DT_BOOL), 2, 1, 2),
        (CacheDesc(2, (4, 2), DataType.DT_STRING), 128, 32, 4),
        (CacheDesc(2, torch.Size([4, 2]), torch.float64), 64, 16, 4),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_geometry(instance_factory, description, size, row_bytes, rows, paged):
    manager = instance_factory().cache_manager
    make = manager.allocate_blocks_cache if paged else manager.allocate_cache
    cache = make(description)
    layout = cache.layout
    assert (layout.row_bytes, layout.row_stride_bytes, layout.rows) == (row_bytes, row_bytes, rows)
    assert (layout.num_tensors, layout.paged) == (description.num_tensors, paged)
    assert cache.is_blocks_cache is paged
    assert {t.nbytes for t in cache.tensors} == {size}
    assert cache.nbytes == size * description.num_tensors
    assert {t.is_contiguous() for t in cache.tensors} == {True}
    if description.data_type is not DataType.DT_STRING:
        assert {tuple(t.shape) for t in cache.tensors} == {tuple(description.shape)}


def test_ids_start_at_1_and_are_never_reused(instance_factory):
    manager = instance_factory().cache_manager
    seen = []
    for make in (
        lambda: manager.allocate_cache(desc(), [K]),
        lambda: manager.register_cache(desc(), tensors_of(desc())),
        lambda: manager.allocate_blocks_cache(desc()),
        lambda: manager.register_blocks_cache(desc(), tensors_of(desc())),
        lambda: manager.create_host_cache(host()),
    ):
        cache = make()
        seen.append(cache.cache_id)
        with cache:
            pass
    assert seen == [1, 2, 3, 4, 5]
    with raises(PI):
        manager.allocate_cache(desc(), [K])  # K is still bound, to cache 1
    assert manager.allocate_cache(desc()).cache_id > 5


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, (2 << 20) + 5])
def test_alignment_and_peak_memory(instance_factory, placement, nbytes):
    datadist = instance_factory()
    count = 3
    description = desc(count, (1, nbytes), DataType.DT_INT8, placement)
    cache = datadist.cache_manager.allocate_cache(description)
    addrs = cache.tensor_addrs
    if placement is Placement.DEVICE or not on_npu():  # pinned memory starts anywhere
        assert addrs[0] % (2 << 20) == 0
    assert [(a - addrs[0]) % PAGE for a in addrs] == [0] * count
    assert [b - a >= nbytes for a, b in itertools.pairwise(addrs)] == [True] * (count - 1)
    for tensor in cache.tensors:
        tensor.fill_(1)
    allowed = count * nbytes + count * PAGE + (2 << 20)
    region = datadist._instance.catalog.find(1).region
    assert region.address == addrs[0]
    assert region.address + region.nbytes >= addrs[-1] + nbytes
    assert region.nbytes <= allowed
    if not on_npu():
        assert resident(addrs[0], allowed) <= allowed


def resident(address: int, nbytes: int) -> int:
    """Bytes in memory of the mappings that begin in this span."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = address <= int(found[1], 16) < address + nbytes and "memfd" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    assert total > 0
    return total


def test_memory_is_returned(instance_factory):
    manager = instance_factory().cache_manager
    manager.allocate_cache(desc())  # with the first come the counters
    before = regions()
    caches = [manager.allocate_cache(desc()) for _ in range(10)]
    assert regions() >= before + 1
    for cache in caches:
        manager.deallocate_cache(cache)
    assert regions() == before


# -- the desc is the caller's (14.37) -------------------------------------------------------------


def test_the_desc_is_never_changed(instance_factory):
    manager = instance_factory().cache_manager
    shape = [4, 8]
    description = host(2, shape)
    before = repr(description), dict(vars(description))
    paged = manager.allocate_blocks_cache(description)
    contiguous = manager.allocate_cache(description)
    registered = manager.register_blocks_cache(description, tensors_of(description))
    again = manager.register_cache(description, tensors_of(description))
    manager.create_host_cache(description)
    kinds = [c.is_blocks_cache for c in (paged, contiguous, registered, again)]
    assert kinds == [True, False, True, False]
    assert contiguous.cache_desc is description
    assert (repr(description), vars(description)) == before
    manager.copy_cache(contiguous, again)
    shape[0] = 100  # the caller's list is the caller's: the cache keeps what it was made with
    with raises(PI):
        manager.copy_cache(contiguous, again, dst_batch_index=50)
    assert contiguous.nbytes == 2 * 4 * 8 * 4

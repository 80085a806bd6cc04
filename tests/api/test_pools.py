# SPDX-License-Identifier: Apache-2.0
"""Caches out of a pool: pages, budgets, and what an error says (reference API, 8.4)."""

from __future__ import annotations

import itertools

import pytest

from llm_datadist_torch import (
    CacheKey,
    DataType,
    LLMOutOfMemoryError,
    Placement,
)
from tests.api.support import (
    OOM,
    PAGE,
    counters,
    desc,
    host,
    page_desc,
    pool_stats,
    raises,
)


def test_pool_of_four_pages(instance_factory):
    """Appendix A."""
    datadist = instance_factory(pool=4 * PAGE)
    manager = datadist.cache_manager
    cache = manager.allocate_cache(page_desc(4))
    for again in (page_desc(), page_desc(4), desc(1, (1, 1), DataType.DT_INT8)):
        with pytest.raises(LLMOutOfMemoryError) as caught:
            manager.allocate_cache(again)
        error = caught.value
        assert error.status_code == OOM
        assert isinstance(error, MemoryError)
        assert (error.free_bytes, error.largest_free_bytes) == (0, 0)
        assert error.requested_bytes == again.num_tensors * PAGE
        for figure in (str(error.requested_bytes), "0 bytes", str(4 * PAGE)):
            assert figure in str(error)
    manager.deallocate_cache(cache)
    assert manager.allocate_cache(page_desc(4)).nbytes == 4 * PAGE


def test_partial_page_is_unusable(instance_factory):
    datadist = instance_factory(pool=3 * PAGE - 1)
    assert pool_stats(datadist).total_bytes == 2 * PAGE
    datadist.cache_manager.allocate_cache(page_desc(2))
    with raises(OOM):
        datadist.cache_manager.allocate_cache(page_desc(1))


@pytest.mark.parametrize("shift", [10, 12, 16, 20])
def test_page_size(instance_factory, shift):
    page = 1 << shift
    datadist = instance_factory(pool=(4 * page, shift))
    cache = datadist.cache_manager.allocate_cache(desc(3, (1, page), DataType.DT_INT8))
    start = datadist._instance._memories[Placement.DEVICE].region.address
    assert {(a - start) % page for a in cache.tensor_addrs} == {0}
    assert pool_stats(datadist).free_bytes == page


def test_a_failed_call_returns_the_tensors_it_had_taken(instance_factory):
    datadist = instance_factory(pool=4 * PAGE)
    before = counters(datadist)
    with pytest.raises(LLMOutOfMemoryError) as caught:
        datadist.cache_manager.allocate_cache(page_desc(5))
    assert caught.value.free_bytes == 4 * PAGE
    assert caught.value.largest_free_bytes == 4 * PAGE
    assert caught.value.requested_bytes == 5 * PAGE
    assert counters(datadist) == before


def test_fragmentation_says_what_is_free_in_one_piece(instance_factory):
    datadist = instance_factory(pool=4 * PAGE)
    manager = datadist.cache_manager
    caches = [manager.allocate_cache(page_desc()) for _ in range(4)]
    caches.sort(key=lambda cache: cache.tensor_addrs)
    manager.deallocate_cache(caches[0])
    manager.deallocate_cache(caches[2])
    with pytest.raises(LLMOutOfMemoryError) as caught:
        manager.allocate_cache(desc(1, (1, 2 * PAGE), DataType.DT_INT8))
    error = caught.value
    figures = error.requested_bytes, error.free_bytes, error.largest_free_bytes
    assert figures == (2 * PAGE, 2 * PAGE, PAGE)
    manager.deallocate_cache(caches[1])  # now three in a row, coalesced at once
    assert pool_stats(datadist).largest_free_bytes == 3 * PAGE
    assert manager.allocate_cache(desc(1, (1, 3 * PAGE), DataType.DT_INT8))


def test_best_fit_takes_the_smallest_span(instance_factory):
    datadist = instance_factory(pool=6 * PAGE)
    manager = datadist.cache_manager
    caches = [manager.allocate_cache(page_desc()) for _ in range(6)]
    caches.sort(key=lambda cache: cache.tensor_addrs)
    for at in (0, 1, 2, 4):  # spans of 3 pages and of 1
        manager.deallocate_cache(caches[at])
    manager.allocate_cache(page_desc())
    assert pool_stats(datadist).largest_free_bytes == 3 * PAGE


def test_pools_are_separate_and_optional(instance_factory):
    datadist = instance_factory(host_pool=PAGE)
    manager = datadist.cache_manager
    manager.allocate_cache(page_desc(4))  # DEVICE has no pool: memory of its own
    assert manager.create_host_cache(host(1)).cache_id == 2
    with raises(OOM):
        manager.allocate_blocks_cache(host(1))
    with raises(OOM):
        manager.create_host_cache(host(1))
    with raises(AttributeError):
        pool_stats(datadist)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_free_in_every_order(instance_factory, order):
    datadist = instance_factory(pool=8 * PAGE)
    manager = datadist.cache_manager
    empty = counters(datadist)
    caches = [manager.allocate_cache(page_desc(2), [CacheKey(1, i)]) for i in range(2)]
    caches += [manager.allocate_blocks_cache(page_desc(2)) for _ in range(2)]
    for at in order:
        if at < 2:
            manager.deallocate_cache(caches[at])
            manager.remove_cache_key(CacheKey(9, at))
        else:
            manager.deallocate_blocks_cache(caches[at])
    assert counters(datadist) == empty
    assert manager.allocate_cache(desc(1, (1, 8 * PAGE), DataType.DT_INT8)).nbytes == 8 * PAGE


def test_tensors_hold_their_pages_after_deallocate(instance_factory):
    datadist = instance_factory(pool=2 * PAGE)
    manager = datadist.cache_manager
    cache = manager.allocate_cache(page_desc(2))
    kept = cache.tensors[0][1:2]
    manager.deallocate_cache(cache)
    assert pool_stats(datadist).spans_in_use == 1
    with raises(OOM, "drop tensors"):
        manager.allocate_cache(page_desc(2))
    del kept
    assert manager.allocate_cache(page_desc(2))

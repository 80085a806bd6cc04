# SPDX-License-Identifier: Apache-2.0
"""register and unregister: what memory is taken, and who keeps it (reference API, 8.6 and 9.1)."""

from __future__ import annotations

import gc
import mmap
import os
import weakref

import numpy as np
import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, CacheDesc, CacheKey, DataType, Placement
from llm_datadist_torch.values.status import LLMStatusCode
from tests.api.support import (
    INVALID,
    KNE,
    PI,
    counters,
    desc,
    host,
    map_pages,
    protect,
    raises,
    raw,
    scramble,
    tensors_of,
    unmap,
    zeros,
)

PAGE = mmap.PAGESIZE
K, B = CacheKey(1, 1), BlocksCacheKey(1, 1)
D = desc(2)


def good() -> list[torch.Tensor]:
    return tensors_of(D)


KEPT = good()
ADDRS = [t.data_ptr() for t in KEPT]

BOTH = ["register_cache", "register_blocks_cache"]

COMMON = [
    # 1 desc type, 2 addrs type
    (("x", None), TypeError),
    ((None, None), TypeError),
    ((None, (1, 2)), TypeError),
    ((None, ADDRS), AttributeError),
    ((desc(0), None), TypeError),
    ((D, tuple(ADDRS)), TypeError),
    ((D, {1, 2}), TypeError),
    ((D, torch.tensor(ADDRS)), TypeError),
    ((D, ["1", "2"]), TypeError),
    ((D, [1.5, 2]), TypeError),
    ((D, [None, None]), TypeError),
    ((D, [True, 1]), TypeError),
    ((D, [1, True]), TypeError),
    ((D, [ADDRS[0], KEPT[1]]), TypeError),
    ((D, [KEPT[0], ADDRS[1]]), TypeError),
    ((D, [-1, 2]), ValueError),
    ((D, [1, 2**64]), ValueError),
    # 3 keys type, before everything that follows
    ((desc(0), [], "x"), TypeError),
    ((desc(0), [], 1), TypeError),
    # 4 flag
    ((desc(0), [], None, 1), TypeError),
    ((desc(0), [], None, "True"), TypeError),
    # 6 addrs not empty, 7 count
    ((D, []), PI),
    ((desc(0), []), PI),
    ((D, ADDRS[:1]), PI),
    ((D, KEPT[:1]), PI),
    ((D, [*ADDRS, 5]), PI),
    ((desc(0), ADDRS), PI),
    # 8 no address 0, 14.21
    ((D, [ADDRS[0], 0]), PI),
    ((D, [0, 0]), PI),
    ((D, [0, ADDRS[0]], None, False), PI),
    # 14.20
    ((D, [1, ADDRS[0]]), PI),
    ((D, [ADDRS[0], 2**64 - 1]), PI),
    ((D, [ADDRS[0], 1], None, False), PI),
    # 9 shape
    ((desc(2, (0, 8)), ADDRS), PI),
    ((desc(2, (4, -8)), ADDRS), PI),
    ((desc(2, (1,) * 32), ADDRS), PI),
    ((desc(2, (2**40, 2**40)), ADDRS), PI),
    ((CacheDesc(2, [4, 8], None), ADDRS), PI),
    # tensors that aren't what the desc says
    ((desc(2, (4, 9)), KEPT), PI),
    ((desc(2, (5, 8)), KEPT), PI),
    ((desc(2, dtype=DataType.DT_FLOAT), KEPT), PI),
    ((D, [KEPT[0], KEPT[0]]), PI),
    ((D, [ADDRS[0], ADDRS[0]]), PI),
    ((D, [KEPT[0], zeros(8, 4).t()]), PI),
]


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(("arguments", "fault"), COMMON)
def test_call_refused_and_nothing_changed(instance_factory, method, arguments, fault):
    datadist = instance_factory(pool=1 << 20)
    if method == "register_cache" and arguments[2:3] == (None,):
        arguments = (*arguments[:2], (), *arguments[3:])
    before = counters(datadist)
    with raises(fault):
        getattr(datadist.cache_manager, method)(*arguments)
    assert counters(datadist) == before


KEY_FAULTS = [
    ("register_cache", None, TypeError),
    ("register_cache", K, TypeError),
    ("register_cache", [None], TypeError),
    ("register_cache", [B], TypeError),
    ("register_blocks_cache", [B], TypeError),
    ("register_blocks_cache", K, TypeError),
    # 14.39: the rules of allocate
    ("register_cache", [CacheKey(1, i) for i in range(5)], PI),
    ("register_cache", [CacheKey(1, INVALID)] * 5, PI),
    ("register_cache", [K, K], PI),
    ("register_cache", [CacheKey(1, 3), CacheKey(9, 3)], PI),
    ("register_cache", [CacheKey(1, 77)], PI),
    ("register_blocks_cache", BlocksCacheKey(1, 77), PI),
]


@pytest.mark.parametrize(("method", "keys", "fault"), KEY_FAULTS)
def test_keys_are_checked_as_for_allocate(instance_factory, method, keys, fault):
    datadist = instance_factory()
    manager = datadist.cache_manager
    manager.allocate_cache(desc(), [CacheKey(1, 77)])
    manager.allocate_blocks_cache(desc(), BlocksCacheKey(1, 77))
    before = counters(datadist)
    with raises(fault):
        getattr(manager, method)(D, good(), keys)
    assert counters(datadist) == before
    datadist.cache_manager.register_cache(D, good(), [K, CacheKey(1, INVALID), CacheKey(1, 3)])


# -- what is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("form", ["ints", "tensors"])
def test_register(instance_factory, method, form):
    manager = instance_factory().cache_manager
    mine = good()
    given = mine if form == "tensors" else [t.data_ptr() for t in mine]
    cache = getattr(manager, method)(D, given)
    assert cache.cache_id == 1
    assert cache.is_registered
    assert cache.is_unowned == (form == "ints")
    assert cache.is_blocks_cache == (method == "register_blocks_cache")
    assert cache.tensor_addrs == [t.data_ptr() for t in mine]
    mine[1].fill_(4)
    assert bool((cache.tensors[1] == 4).all())
    given.append(given[0])  # the caller's list is the caller's
    assert len(cache.tensors) == 2


def test_ids_of_the_reference_samples(instance_factory):
    """Appendix A: the first is 1, the next 2."""
    manager = instance_factory().cache_manager
    description = CacheDesc(4, [2, 8], DataType.DT_FLOAT16)
    one = manager.register_cache(description, tensors_of(description))
    two = manager.register_blocks_cache(description, tensors_of(description))
    assert (one.cache_id, two.cache_id) == (1, 2)
    assert (one.layout.row_bytes, one.layout.rows, one.cache_desc.size) == (16, 2, 32)


def test_strided_views(instance_factory):
    manager = instance_factory().cache_manager
    kv = zeros(4, 2, 8)
    cache = manager.register_blocks_cache(D, [kv[:, 0], kv[:, 1]])
    assert (cache.layout.row_bytes, cache.layout.row_stride_bytes, cache.layout.extent) == (
        32,
        64,
        224,
    )
    kv[0, 0].fill_(3)
    kv[0, 1].fill_(4)
    manager.copy_blocks(cache, {0: [2]})
    assert kv[:, :, 0].tolist() == [[3, 4], [0, 0], [3, 4], [0, 0]]


BAD_ROWS = [
    lambda: zeros(4, 16)[:, ::2],
    lambda: zeros(8, 4).t(),
    lambda: zeros(1, 8).expand(4, 8),
    lambda: zeros(11).as_strided((4, 8), (1, 1)),
    lambda: zeros(8, 8)[::2].flip(1).t().t()[:, ::1].t().t()[:3],
]


@pytest.mark.parametrize("make", BAD_ROWS)
def test_rows_are_checked(instance_factory, make):
    with raises(PI, r"tensors\[1\]"):
        instance_factory().cache_manager.register_cache(D, [good()[0], make()])


def test_one_row_may_have_any_stride(instance_factory):
    wide = zeros(1, 64)[:, :8]
    cache = instance_factory().cache_manager.register_cache(desc(1, (1, 8)), [wide])
    assert cache.layout.row_stride_bytes == 32


@pytest.mark.host_memory_only
def test_message_names_index_and_address(instance_factory):
    manager = instance_factory().cache_manager
    address = map_pages(4 * PAGE)
    description = desc(2, (4, PAGE), DataType.DT_INT8)
    fine = torch.zeros(4, PAGE, dtype=torch.int8)
    for spoil in (
        lambda: protect(address + PAGE, PAGE, mmap.PROT_READ),
        lambda: unmap(address + PAGE, PAGE),
        lambda: unmap(address, 4 * PAGE),
    ):
        spoil()
        for index in (0, 1):
            addrs = [fine.data_ptr()] * 2
            addrs[index] = address
            with raises(PI, rf"addrs\[{index}\]={address:#x}"):
                manager.register_cache(description, addrs)


@pytest.mark.parametrize(
    ("remote", "placement", "flag", "accessible"),
    [
        (True, Placement.DEVICE, None, True),
        (True, Placement.HOST, None, False),
        (True, Placement.HOST, True, True),
        (True, Placement.DEVICE, False, False),
        # two-sided mode moves host memory too, so nothing needs the flag there
        (False, Placement.DEVICE, None, True),
        (False, Placement.HOST, None, True),
        (False, Placement.HOST, False, False),
    ],
)
@pytest.mark.parametrize("method", BOTH)
def test_remote_accessible(instance_factory, method, remote, placement, flag, accessible):
    datadist = instance_factory(remote=remote)
    description = desc(2, placement=placement)
    register, given = getattr(datadist.cache_manager, method), tensors_of(description)
    cache = register(description, given, remote_accessible=flag)
    assert datadist._instance.catalog.find(cache.cache_id).remote_accessible is accessible


# -- lifetimes ------------------------------------------------------------------------------------


def test_tensors_are_kept_alive(instance_factory):
    datadist = instance_factory()
    mine = good()
    scramble(mine, 8)
    before = [raw(t) for t in mine]
    datadist.cache_manager.register_cache(D, mine)
    addrs = {t.data_ptr() for t in mine}
    del mine
    gc.collect()  # not even the Cache is held by anyone
    noise = tensors_of(desc(2000), fill=77)
    assert not {t.data_ptr() for t in noise} & addrs
    assert [raw(t) for t in datadist._instance.catalog.find(1).tensors] == before


@pytest.mark.parametrize("end", ["unregister", "finalize", "nothing"])
def test_memory_is_let_go_at_the_end(instance_factory, end):
    datadist = instance_factory()
    owner = np.zeros((4, 8), dtype=np.int32)
    alive = weakref.ref(owner)
    cache = datadist.cache_manager.register_cache(host(1), [torch.from_numpy(owner)])
    del owner
    if end == "unregister":
        datadist.cache_manager.unregister_cache(cache.cache_id)
    elif end == "finalize":
        datadist.finalize()
    gc.collect()
    assert (alive() is not None) == (end == "nothing")


def test_the_same_memory_in_two_caches(instance_factory):
    """14.29: one survives the other's unregister."""
    manager = instance_factory().cache_manager
    mine = good()
    for form in (mine, [t.data_ptr() for t in mine]):
        one = manager.register_blocks_cache(D, form)
        other = manager.register_blocks_cache(D, form)
        assert one.cache_id != other.cache_id
        manager.copy_blocks(one, {0: [1]})
        manager.unregister_cache(one.cache_id)
        mine[0][2].fill_(9)
        manager.copy_blocks(other, {2: [3]})
        assert bool((mine[0][3] == 9).all())
        with raises(KNE):
            manager.copy_blocks(one, {2: [3]})
        manager.unregister_cache(other.cache_id)


# -- unregister -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache_id", "fault"),
    [(None, TypeError), ("1", TypeError), (1.0, TypeError), (2**63, ValueError)],
)
def test_unregister_refuses(instance_factory, cache_id, fault):
    with raises(fault):
        instance_factory().cache_manager.unregister_cache(cache_id)


@pytest.mark.parametrize("cache_id", [0, 1, -1, 99, 2**63 - 1, -(2**63)])
def test_unregister_of_unknown_ids_is_success(instance_factory, cache_id):
    assert instance_factory().cache_manager.unregister_cache(cache_id) is None


def test_unregister_invalidates(instance_factory):
    """14.22."""
    datadist = instance_factory()
    manager = datadist.cache_manager
    cache = manager.register_cache(D, good(), [K])
    for _ in range(2):
        manager.unregister_cache(cache.cache_id)
        assert cache.tensor_addrs == []
        assert len(datadist._instance.catalog) == datadist._instance.catalog.num_keys == 0
    with raises(KNE):
        manager.copy_cache(cache, cache)


@pytest.mark.parametrize("afterwards", ["nothing", "deallocate"])
def test_unregister_of_an_allocated_cache(instance_factory, afterwards):
    """14.23."""
    datadist = instance_factory()
    manager = datadist.cache_manager
    cache = manager.allocate_cache(desc(), [K])
    if afterwards == "deallocate":  # K still keeps it
        manager.deallocate_cache(cache)
    before = counters(datadist)
    with raises(PI):
        manager.unregister_cache(cache.cache_id)
    assert counters(datadist) == before
    assert cache.ended == (afterwards == "deallocate")


@pytest.mark.parametrize("paged", [False, True])
def test_deallocate_of_a_registered_cache_does_nothing(instance_factory, paged, caplog):
    """14.48."""
    datadist = instance_factory()
    manager = datadist.cache_manager
    make = manager.register_blocks_cache if paged else manager.register_cache
    end = manager.deallocate_blocks_cache if paged else manager.deallocate_cache
    cache = make(D, good())
    before = counters(datadist)
    for _ in range(2):
        end(cache)
    assert counters(datadist) == before
    assert len(cache.tensor_addrs) == len(cache.tensors) == 2
    assert "unregister_cache" in caplog.text
    manager.unregister_cache(cache.cache_id)
    end(cache)


def test_unregister_waits_for_leases_and_says_so(instance_factory):
    datadist = instance_factory(timeout_ms=50)
    manager, catalog = datadist.cache_manager, datadist._instance.catalog
    cache = manager.register_cache(D, good(), [K])
    entry = catalog.find(cache.cache_id)
    lease = catalog.acquire(entry)
    with raises(LLMStatusCode.LLM_TIMEOUT, "still used"):
        manager.unregister_cache(cache.cache_id)
    assert len(cache.tensors) == 2
    assert catalog.num_keys == 1
    lease.release()
    manager.unregister_cache(cache.cache_id)
    assert cache.ended


def test_strings_and_host_placement(instance_factory):
    manager = instance_factory().cache_manager
    text = torch.zeros(4, 8, 16, dtype=torch.uint8)
    cache = manager.register_cache(host(1, dtype=DataType.DT_STRING), [text])
    assert cache.layout.row_bytes == 128


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_caches_registered_in_a_forked_child_are_the_parents(instance_factory):
    """A child that was forked must not be able to use what its parent owns."""
    manager = instance_factory().cache_manager
    manager.register_cache(D, good())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            manager.unregister_cache(1)
        except RuntimeError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    manager.unregister_cache(1)


@pytest.mark.parametrize("paged", [False, True])
def test_a_tuple_of_tensors_is_taken(instance_factory, paged):
    """It is what ``Cache.tensors`` gives; a tuple of ints is refused, as in the reference."""
    manager = instance_factory().cache_manager
    make = manager.register_blocks_cache if paged else manager.register_cache
    source = manager.allocate_blocks_cache(D) if paged else manager.allocate_cache(D)
    cache = make(D, source.tensors)
    assert cache.tensor_addrs == source.tensor_addrs
    with raises(TypeError):
        make(D, (source.tensors[0], source.tensor_addrs[1]))

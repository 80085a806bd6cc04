# SPDX-License-Identifier: Apache-2.0
"""The Cache object, and create_cpu_cache (reference API, 7.3)."""

from __future__ import annotations

import gc

import pytest
import torch

from llm_datadist_torch import Cache
from tests.api.support import (
    KNE,
    PI,
    desc,
    host,
    raises,
    raw,
    scramble,
    tensors_of,
)
from tests.devices import device_of


@pytest.fixture(params=["allocated", "allocated blocks", "registered", "registered blocks", "cpu"])
def cache(request, instance_factory):
    manager = instance_factory().cache_manager
    if request.param == "allocated":
        return manager.allocate_cache(desc(4))
    if request.param == "allocated blocks":
        return manager.allocate_blocks_cache(desc(4))
    if request.param == "registered":
        return manager.register_cache(desc(4), tensors_of(desc(4)))
    if request.param == "registered blocks":
        return manager.register_blocks_cache(desc(4), tensors_of(desc(4)))
    return Cache.create_cpu_cache(host(4), tensors_of(host(4)))


# -- what a cache says of itself ------------------------------------------------------------------


def test_tensors_and_addresses(cache):
    assert isinstance(cache.tensors, tuple)
    assert [t.shape for t in cache.tensors] == [torch.Size([4, 8])] * 4
    assert {t.dtype for t in cache.tensors} == {torch.int32}
    assert cache.tensor_addrs == [t.data_ptr() for t in cache.tensors]
    assert type(cache.tensor_addrs) is list
    assert {type(a) for a in cache.tensor_addrs} == {int}
    assert cache.nbytes == 4 * 4 * 8 * 4
    assert cache.device == device_of(cache.cache_desc.placement)
    assert cache.cache_desc.num_tensors == 4


def test_tensor_addrs_is_a_copy(cache):
    cache.tensor_addrs.clear()
    assert len(cache.tensor_addrs) == 4


def test_layer_and_block_are_views(cache):
    assert [t.data_ptr() for t in cache.layer(1)] == cache.tensor_addrs[2:4]
    assert [t.data_ptr() for t in cache.layer(3, 1)] == cache.tensor_addrs[3:]
    assert [t.data_ptr() for t in cache.layer(0, 4)] == cache.tensor_addrs
    rows = cache.block(2)
    assert [r.shape for r in rows] == [torch.Size([8])] * 4
    assert [r.data_ptr() for r in rows] == [a + 2 * 32 for a in cache.tensor_addrs]
    rows[1].fill_(7)
    assert bool((cache.tensors[1][2] == 7).all())
    assert not bool((cache.tensors[0] == 7).any())


@pytest.mark.parametrize(
    ("method", "arguments", "fault"),
    [
        ("layer", (-1,), IndexError),
        ("layer", (2,), IndexError),
        ("layer", (4, 1), IndexError),
        ("layer", (0, 5), IndexError),
        ("layer", (0, 0), PI),
        ("layer", (0, -2), PI),
        ("block", (-1,), IndexError),
        ("block", (4,), IndexError),
    ],
)
def test_layer_and_block_out_of_range(cache, method, arguments, fault):
    with raises(fault):
        getattr(cache, method)(*arguments)


def test_str_is_the_reference_text(instance_factory):
    manager = instance_factory().cache_manager
    contiguous, paged = manager.allocate_cache(desc(4)), manager.allocate_blocks_cache(desc(4))
    assert str(contiguous) == (
        "Cache(cache_id = 1, device_tensor_addrs = 4, is_blocks_cache = False)"
    )
    assert str(paged) == "Cache(cache_id = 2, device_tensor_addrs = 4, is_blocks_cache = True)"
    cpu = Cache.create_cpu_cache(host(), tensors_of(host()))
    assert str(cpu) == "Cache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)"
    manager.deallocate_cache(contiguous)
    assert str(contiguous) == (
        "Cache(cache_id = 1, device_tensor_addrs = 0, is_blocks_cache = False)"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: m.allocate_cache(desc(4)), ["id=1", "contiguous", "allocated", "DEVICE"]),
        (lambda m: m.allocate_blocks_cache(host(4)), ["id=1", "blocks", "allocated", "HOST"]),
        (lambda m: m.register_cache(desc(4), tensors_of(desc(4))), ["contiguous", "registered"]),
        (lambda m: Cache.create_cpu_cache(host(4), tensors_of(host(4))), ["id=-1", "wrapped"]),
    ],
)
def test_repr_is_honest(instance_factory, make, words):
    cache = make(instance_factory().cache_manager)
    text = repr(cache)
    device = str(device_of(cache.cache_desc.placement))
    for word in [*words, "4 x [4, 8]", "DT_INT32", "512 bytes", device]:
        assert word in text


def test_repr_is_of_the_cache_and_not_of_what_the_desc_became(instance_factory):
    shape = [4, 8]
    cache = instance_factory().cache_manager.allocate_cache(desc(2, shape))
    shape[0] = 100
    assert "2 x [4, 8]" in repr(cache)


def test_repr_says_how_it_ended(instance_factory):
    manager = instance_factory().cache_manager
    cache = manager.allocate_cache(desc())
    manager.deallocate_cache(cache)
    assert "ended by deallocate_cache" in repr(cache)
    cache = manager.register_cache(desc(), tensors_of(desc()))
    manager.unregister_cache(cache.cache_id)
    assert "ended by unregister_cache" in repr(cache)


# -- the end of a cache ---------------------------------------------------------------------------


def test_context_manager_ends_it(cache, instance_factory):
    tensors = cache.tensors
    with cache as same:
        assert same is cache
    assert cache.ended
    assert cache.tensor_addrs == []
    assert tensors[0].sum() is not None
    with cache:  # once more is fine
        pass


def test_context_manager_ends_it_after_an_error(cache):
    with pytest.raises(KeyError), cache:
        raise KeyError
    assert cache.ended


def test_context_manager_frees_the_catalog(instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    with manager.allocate_cache(desc()), manager.register_cache(desc(), tensors_of(desc())):
        assert len(datadist._instance.catalog) == 2
    assert len(datadist._instance.catalog) == 0


def test_ended_cache_refuses_use(cache):
    with cache:
        pass
    assert cache.tensor_addrs == []
    for use in (
        lambda: cache.tensors,
        lambda: cache.layer(0),
        lambda: cache.layer(0, 0),
        lambda: cache.block(0),
    ):
        with raises(KNE, "has ended"):
            use()
    assert cache.nbytes == 512
    assert cache.cache_desc.num_tensors == 4


@pytest.mark.parametrize("pool", [None, 1 << 20])
def test_tensors_outlive_the_cache(instance_factory, pool):
    manager = instance_factory(pool=pool).cache_manager
    cache = manager.allocate_cache(desc())
    first, second = cache.tensors
    view = second[1:3]
    first.fill_(1)
    second.fill_(2)
    manager.deallocate_cache(cache)
    del cache, second
    gc.collect()
    others = [manager.allocate_cache(desc()) for _ in range(4)]
    for other in others:
        for tensor in other.tensors:
            tensor.fill_(9)
    assert bool((first == 1).all())
    assert bool((view == 2).all())


def test_registered_tensors_are_kept_alive(cache):
    if cache.is_unowned or not cache.is_registered:
        return
    scramble(cache.tensors, seed=3)
    before = [raw(t) for t in cache.tensors]
    gc.collect()
    noise = tensors_of(desc(1000), fill=77)
    assert [raw(t) for t in cache.tensors] == before
    assert len(noise) == 1000

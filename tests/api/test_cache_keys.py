# SPDX-License-Identifier: Apache-2.0
"""Keys and ids: who keeps a cache alive (reference API, 8.5), also at random."""

from __future__ import annotations

import gc
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    LLMDataDist,
    LLMException,
    LLMOutOfMemoryError,
    LLMRole,
    Placement,
)
from tests.api.support import (
    INVALID,
    OOM,
    PAGE,
    PI,
    bound,
    desc,
    page_desc,
    pool_stats,
    raises,
    tensors_of,
)
from tests.conftest import make_options
from tests.devices import examples
from tests.reference import CatalogModel

pytestmark = pytest.mark.same_on_every_device

K = CacheKey(1, 1)


def test_position_is_row_and_placeholders_skip(instance_factory):
    """Appendix A: [k0, placeholder, k2] in 4 rows, freed only at the last step."""
    datadist = instance_factory(pool=4 * PAGE)
    manager = datadist.cache_manager
    k0, k2 = CacheKey(1, 10), CacheKey(1, 12)
    cache = manager.allocate_cache(page_desc(), [k0, CacheKey(1, INVALID), k2])
    assert (bound(datadist, k0), bound(datadist, k2)) == ((1, 0), (1, 2))
    steps = [
        lambda: manager.deallocate_cache(cache),
        lambda: manager.remove_cache_key(k0),
        lambda: manager.remove_cache_key(k0),
        lambda: manager.deallocate_cache(cache),
        lambda: manager.remove_cache_key(CacheKey(1, INVALID)),
        lambda: manager.remove_cache_key(CacheKey(1, 999)),
    ]
    for step in steps:
        step()
        assert pool_stats(datadist).spans_in_use == 1
    assert bound(datadist, k2) == (1, 2)
    manager.remove_cache_key(k2)
    assert pool_stats(datadist).spans_in_use == 0
    assert len(datadist._instance.catalog) == 0


def test_keys_removed_before_deallocate(instance_factory):
    datadist = instance_factory(pool=PAGE)
    manager = datadist.cache_manager
    cache = manager.allocate_cache(page_desc(), [K])
    manager.remove_cache_key(K)
    assert len(cache.tensors) == 1
    manager.deallocate_cache(cache)
    assert pool_stats(datadist).spans_in_use == 0


def test_all_rows_may_be_placeholders(instance_factory):
    """14.38: placeholders take no part in the tests for duplicates."""
    datadist = instance_factory()
    manager = datadist.cache_manager
    manager.allocate_blocks_cache(desc(), BlocksCacheKey(1, 0))
    for _ in range(2):
        manager.allocate_cache(desc(), [CacheKey(1, INVALID)] * 4)
    assert datadist._instance.catalog.num_keys == 1


def test_same_request_with_other_models(instance_factory):
    """14.16: keys are full tuples."""
    datadist = instance_factory()
    manager = datadist.cache_manager
    keys = [CacheKey(1, 5, 0), CacheKey(1, 5, 1), CacheKey(1, INVALID, 0, 5), CacheKey(1, 6, 0)]
    cache = manager.allocate_cache(desc(), keys)
    assert [bound(datadist, key) for key in keys] == [(1, row) for row in range(4)]
    manager.remove_cache_key(keys[1])
    manager.deallocate_cache(cache)
    assert [bound(datadist, key) for key in keys] == [(1, 0), None, (1, 2), (1, 3)]


def test_prefix_wins_over_request(instance_factory):
    datadist = instance_factory()
    both = CacheKey(1, 5, 0, 9)
    datadist.cache_manager.allocate_cache(desc(), [both])
    assert bound(datadist, CacheKey(1, INVALID, 0, 9)) == (1, 0)
    assert bound(datadist, CacheKey(1, 5)) is None
    with raises(PI):
        datadist.cache_manager.allocate_cache(desc(), [CacheKey(1, 6, 0, 9)])


def test_the_cluster_id_of_a_key_is_ignored(instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    manager.allocate_cache(desc(), [CacheKey(1, 5)])
    with raises(PI, "bound to cache 1"):
        manager.allocate_cache(desc(), [CacheKey(2, 5)])
    manager.remove_cache_key(CacheKey(3, 5))
    assert bound(datadist, CacheKey(1, 5)) is None


def test_blocks_key_goes_with_deallocate(instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    key = BlocksCacheKey(1, 3)
    cache = manager.allocate_blocks_cache(desc(), key)
    with raises(PI):
        manager.allocate_blocks_cache(desc(), key)
    manager.allocate_blocks_cache(desc(), BlocksCacheKey(1, 4))
    manager.deallocate_blocks_cache(cache)
    assert bound(datadist, key) is None
    manager.allocate_blocks_cache(desc(), key)


def test_remove_cache_key_leaves_registered_caches_alone(instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    cache = manager.register_cache(desc(), tensors_of(desc()), [K])
    manager.remove_cache_key(K)
    assert bound(datadist, K) == (1, 0)
    manager.unregister_cache(cache.cache_id)
    assert bound(datadist, K) is None


def test_dropping_the_cache_object_frees_nothing(instance_factory):
    datadist = instance_factory(pool=PAGE)
    datadist.cache_manager.allocate_cache(page_desc())
    gc.collect()
    assert pool_stats(datadist).spans_in_use == 1
    assert len(datadist._instance.catalog) == 1


# -- everything at random, against the model ------------------------------------------------------

PAGES = 6
KEYS = [
    None,
    ("request", 1, 0),
    ("request", 2, 0),
    ("request", 1, 1),
    ("prefix", 1, 0),
    ("prefix", 1, 1),
]
BLOCK_KEYS = [None, ("blocks", 0), ("blocks", 1)]


def public(key: tuple | None) -> CacheKey | BlocksCacheKey:
    if key is None:
        return CacheKey(1, INVALID)
    if key[0] == "blocks":
        return BlocksCacheKey(1, key[1])
    kind, value, model = key
    return CacheKey(1, value, model) if kind == "request" else CacheKey(1, INVALID, model, value)


ids = st.integers(0, 12)  # of the caches made so far, counted round and round
key_lists = st.one_of(
    st.lists(st.sampled_from(KEYS), max_size=4),
    st.permutations(KEYS).map(lambda keys: keys[:4]),  # no repetition: too many, or just right
    st.permutations(KEYS).map(lambda keys: keys[:3]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("allocate"),
            st.integers(1, 3),
            key_lists,
            st.sampled_from([False, False, False, True]),
        ),
        st.tuples(st.just("allocate blocks"), st.integers(1, 3), st.sampled_from(BLOCK_KEYS)),
        st.tuples(st.just("register"), st.sampled_from(["good", "wild"]), key_lists),
        st.tuples(st.just("register blocks"), st.sampled_from(BLOCK_KEYS)),
        st.tuples(st.just("deallocate"), ids),
        st.tuples(st.just("wrong kind"), ids),
        st.tuples(st.just("unregister"), ids),
        st.tuples(st.just("remove key"), st.sampled_from(KEYS)),
    ),
    min_size=5,
    max_size=30,
)


class World:
    """An instance and its model, driven by the same steps."""

    def __init__(self) -> None:
        self.datadist = LLMDataDist(LLMRole.MIX, 3)
        self.datadist.init(make_options(listen=None, pool=PAGES * PAGE))
        self.manager = self.datadist.cache_manager
        self.model = CatalogModel(PAGES)
        self.handles: dict[int, Cache] = {}
        self.errors: list[Exception] = []  # kept: an error must not hold memory

    def create(self, make, keys, *, rows, pages, paged, owned, broken=None) -> None:
        expected = broken or self.model.fault(rows, keys, pages=pages, paged=paged)
        if expected:
            with pytest.raises(LLMException) as caught:
                make()
            assert caught.value.status_code == (OOM if expected == "memory" else PI)
            self.errors.append(caught.value)
            return
        cache = make()
        assert cache.cache_id > max([0, *self.handles])
        self.handles[cache.cache_id] = cache
        self.model.add(cache.cache_id, keys, pages=pages, paged=paged, owned=owned)

    def step(self, name: str, *args) -> None:
        getattr(self, "do_" + name.replace(" ", "_"))(*args)

    def do_allocate(self, count, keys, injected) -> None:
        memory = self.datadist._instance._memories[Placement.DEVICE]
        if injected:
            real = memory.allocate

            def failing(*args):
                real(*args)
                raise LLMOutOfMemoryError("injected")

            memory.allocate = failing
        try:
            self.create(
                lambda: self.manager.allocate_cache(page_desc(count, 3), list(map(public, keys))),
                keys, rows=3, pages=count, paged=False, owned=True,
                broken="memory" if injected else None,
            )  # fmt: skip
        finally:
            memory.__dict__.pop("allocate", None)

    def do_allocate_blocks(self, count, key) -> None:
        self.create(
            lambda: self.manager.allocate_blocks_cache(page_desc(count), key and public(key)),
            [key], rows=4, pages=count, paged=True, owned=True,
        )  # fmt: skip

    def do_register(self, memory, keys) -> None:
        given = tensors_of(desc(1)) if memory == "good" else [1]
        self.create(
            lambda: self.manager.register_cache(desc(1), given, list(map(public, keys))),
            keys, rows=4, pages=0, paged=False, owned=False,
            broken=None if memory == "good" else "address",
        )  # fmt: skip

    def do_register_blocks(self, key) -> None:
        self.create(
            lambda: self.manager.register_blocks_cache(
                desc(1), tensors_of(desc(1)), key and public(key)
            ),
            [key], rows=4, pages=0, paged=True, owned=False,
        )  # fmt: skip

    def some(self, number: int) -> Cache | None:
        made = list(self.handles.values())
        return made[number % len(made)] if made else None

    def do_deallocate(self, number) -> None:
        if cache := self.some(number):
            if cache.is_blocks_cache:
                self.manager.deallocate_blocks_cache(cache)
            else:
                self.manager.deallocate_cache(cache)
            assert cache.ended or cache.is_registered
            self.model.deallocate(cache.cache_id)

    def do_wrong_kind(self, number) -> None:
        if cache := self.some(number):
            with raises(PI):
                if cache.is_blocks_cache:
                    self.manager.deallocate_cache(cache)
                else:
                    self.manager.deallocate_blocks_cache(cache)

    def do_unregister(self, number) -> None:
        cache = self.some(number)
        cache_id = cache.cache_id if cache else number
        if self.model.unregister(cache_id):
            self.manager.unregister_cache(cache_id)
            self.manager.unregister_cache(cache_id)
        else:
            with raises(PI):
                self.manager.unregister_cache(cache_id)

    def do_remove_key(self, key) -> None:
        self.manager.remove_cache_key(public(key))
        self.model.remove_key(key)

    def check(self) -> None:
        catalog = self.datadist._instance.catalog
        assert len(catalog) == len(self.model.caches)
        assert catalog.num_keys == len(self.model.keys)
        for key in [*KEYS[1:], *BLOCK_KEYS[1:]]:
            assert bound(self.datadist, public(key)) == self.model.keys.get(key)
        stats = pool_stats(self.datadist)
        assert stats.spans_in_use == self.model.pages_used
        assert stats.free_bytes == (PAGES - self.model.pages_used) * PAGE
        for cache_id, cache in self.handles.items():
            known = self.model.caches.get(cache_id)
            assert cache.ended == (known is None or not known["held"])


@settings(deadline=None, max_examples=examples(120))
@given(STEPS)
def test_any_sequence_equals_the_model(steps):
    world = World()
    try:
        for step in steps:
            world.step(*step)
            world.check()
    finally:
        world.datadist.finalize()


def test_many_threads_come_and_go(instance_factory):
    datadist = instance_factory(pool=64 * PAGE)
    manager = datadist.cache_manager
    seen: list[int] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(60):
                key = CacheKey(1, number * 1000 + step)
                cache = manager.allocate_cache(page_desc(2), [key])
                seen.append(cache.cache_id)
                blocks = manager.register_blocks_cache(desc(), tensors_of(desc()))
                seen.append(blocks.cache_id)
                manager.deallocate_cache(cache)
                manager.remove_cache_key(key)
                manager.unregister_cache(blocks.cache_id)
        except BaseException as error:  # noqa: BLE001 (reported below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sorted(seen) == list(range(1, 6 * 60 * 2 + 1))
    assert len(datadist._instance.catalog) == datadist._instance.catalog.num_keys == 0
    assert pool_stats(datadist).spans_in_use == 0


@pytest.mark.parametrize("paged", [False, True])
def test_one_key_for_many_threads(instance_factory, paged):
    """Exactly one of those who want the same key at once gets it."""
    datadist = instance_factory(pool=64 * PAGE)
    manager = datadist.cache_manager
    got: list[Cache] = []
    refused: list[LLMException] = []
    start = threading.Barrier(6)

    def work() -> None:
        start.wait(30)
        try:
            if paged:
                got.append(manager.allocate_blocks_cache(page_desc(), BlocksCacheKey(1, 5)))
            else:
                got.append(manager.allocate_cache(page_desc(), [CacheKey(1, 5)]))
        except LLMException as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(got), len(refused)) == (1, 5)
    assert {error.status_code for error in refused} == {PI}
    assert pool_stats(datadist).spans_in_use == 1


def test_the_way_to_free_a_bound_key_works(instance_factory):
    manager = instance_factory().cache_manager
    rows, blocks, registered = CacheKey(1, 5), BlocksCacheKey(1, 5), BlocksCacheKey(1, 6)
    manager.allocate_cache(desc(), [rows])
    with raises(PI, "remove_cache_key"):
        manager.allocate_cache(desc(), [rows])
    manager.remove_cache_key(rows)
    manager.allocate_cache(desc(), [rows])

    cache = manager.allocate_blocks_cache(desc(), blocks)
    with raises(PI, rf"deallocate_blocks_cache\(\) of cache {cache.cache_id}"):
        manager.allocate_blocks_cache(desc(), blocks)
    manager.deallocate_blocks_cache(cache)
    manager.allocate_blocks_cache(desc(), blocks)

    tensors = tensors_of(desc())
    cache = manager.register_blocks_cache(desc(), tensors, registered)
    with raises(PI, rf"unregister_cache\({cache.cache_id}\)"):
        manager.register_blocks_cache(desc(), tensors, registered)
    manager.unregister_cache(cache.cache_id)
    manager.register_blocks_cache(desc(), tensors, registered)


def test_caches_whose_handle_is_gone_are_known(instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    kept, dropped = manager.allocate_cache(desc()), manager.allocate_cache(desc())
    numbers = kept.cache_id, dropped.cache_id
    assert [(each.cache_id, each.dropped) for each in datadist.stats().caches] == [
        (numbers[0], False), (numbers[1], False),
    ]  # fmt: skip
    del dropped
    gc.collect()
    assert [(each.cache_id, each.dropped) for each in datadist.stats().caches] == [
        (numbers[0], False), (numbers[1], True),
    ]  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""The end of an instance: finalize, and the exit of the interpreter (reference API, 6.4)."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheManager,
    EventSynchronizer,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMOutOfMemoryError,
    LLMRole,
    MemInfo,
    Memtype,
)
from llm_datadist_torch.api.datadist import _shutdown_handler
from tests.api.support import (
    FAILED,
    KNE,
    PI,
    address_of,
    desc,
    host,
    raises,
    regions,
    tensors_of,
)
from tests.conftest import make_options


def test_finalize_is_idempotent_and_fine_before_init(instance_factory):
    LLMDataDist(LLMRole.PROMPT, 5).finalize()
    datadist = instance_factory()
    datadist.finalize()
    datadist.finalize()
    assert "not initialised" in repr(datadist)


def test_finalize_ends_threads_and_frees_the_port(instance_factory):
    threads = threading.active_count()
    datadist = instance_factory()
    assert threading.active_count() > threads
    listen = "{}:{}".format(*datadist.listen_address)
    datadist.finalize()
    assert threading.active_count() == threads
    assert instance_factory(listen=listen).listen_address == address_of(listen)


MANAGER_CALLS = [
    (FAILED, "allocate_cache", lambda c: (desc(),)),
    (FAILED, "allocate_blocks_cache", lambda c: (desc(),)),
    (FAILED, "create_host_cache", lambda c: (host(),)),
    (FAILED, "register_cache", lambda c: (desc(), tensors_of(desc()))),
    (FAILED, "register_blocks_cache", lambda c: (desc(), tensors_of(desc()))),
    (FAILED, "unregister_cache", lambda c: (1,)),
    (PI, "deallocate_cache", lambda c: (c,)),
    (PI, "deallocate_blocks_cache", lambda c: (c,)),
    (PI, "remove_cache_key", lambda c: (CacheKey(1, 1),)),
    (PI, "copy_cache", lambda c: (c, c)),
    (PI, "copy_blocks", lambda c: (c, {0: [1]})),
    (PI, "swap_blocks", lambda c: (c, c, {0: 1})),
    (PI, "pull_cache", lambda c: (CacheKey(1, 1), c)),
    (PI, "pull_blocks", lambda c: (BlocksCacheKey(1), c, [0], [1])),
    (PI, "push_cache", lambda c: (CacheKeyByIdAndIndex(1, 1), c)),
    (PI, "push_blocks", lambda c: (BlocksCacheKey(1), c, [0], [1])),
    (PI, "pull_cache_async", lambda c: (CacheKey(1, 1), c)),
    (PI, "pull_blocks_async", lambda c: (BlocksCacheKey(1), c, [0], [1])),
    (PI, "push_cache_async", lambda c: (CacheKeyByIdAndIndex(1, 1), c)),
    (PI, "push_blocks_async", lambda c: (BlocksCacheKey(1), c, [0], [1])),
    (PI, "transfer_cache_async", lambda c: (c, EventSynchronizer([]), [])),
    (PI, "remap_registered_memory", lambda c: (MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1),)),
]


@pytest.mark.parametrize(
    ("status", "name", "arguments"), MANAGER_CALLS, ids=[name for _, name, _ in MANAGER_CALLS]
)
def test_saved_manager_after_finalize(status, name, arguments, instance_factory):
    datadist = instance_factory()
    manager = datadist.cache_manager
    cache = manager.allocate_cache(desc())
    datadist.finalize()
    with raises(status, "finalized"):
        getattr(manager, name)(*arguments(cache))
    datadist.init(make_options())  # a new life does not wake the old manager
    with raises(status, "finalized"):
        getattr(manager, name)(*arguments(cache))


def test_every_manager_method_is_covered_above():
    public = {n for n in dir(CacheManager) if not n.startswith("_")}
    assert public == {name for _, name, _ in MANAGER_CALLS}


@pytest.mark.parametrize("pool", [None, 1 << 20])
def test_caches_refuse_and_tensors_stay_after_finalize(instance_factory, pool):
    datadist = instance_factory(pool=pool)
    manager = datadist.cache_manager
    caches = [manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())]
    mine = tensors_of(desc())
    caches += [manager.register_cache(desc(), mine)]
    taken = [cache.tensors for cache in caches]
    for fill, tensors in enumerate(taken):
        for tensor in tensors:
            tensor.fill_(fill + 1)
    datadist.finalize()
    for cache in caches:
        assert cache.ended
        assert cache.tensor_addrs == []
        assert "finalize" in repr(cache)
        with raises(KNE, "finalize"):
            _ = cache.tensors
    del manager, caches, datadist
    gc.collect()
    noise = tensors_of(desc(8, (1 << 16,)), fill=99)
    for fill, tensors in enumerate(taken):
        assert all(bool((tensor == fill + 1).all()) for tensor in tensors)
    assert len(noise) == 8


@pytest.mark.parametrize("pool", [None, 1 << 20])
def test_finalize_releases_memory_whatever_handles_are_left(instance_factory, pool):
    before = regions()
    datadist = instance_factory(pool=pool)
    manager = datadist.cache_manager
    cache = manager.allocate_cache(desc())
    assert regions() == before + 2  # the cache or pool, and the counters
    datadist.finalize()
    gc.collect()
    assert (cache.ended, manager is not None) == (True, True)
    assert regions() == before


def test_finalize_releases_memory_when_handles_are_gone(instance_factory):
    before = regions()
    for pool in (None, 1 << 20):
        datadist = instance_factory(pool=pool)
        datadist.cache_manager.allocate_cache(desc(), [CacheKey(1, 1)])
        assert regions() == before + 2
        datadist.finalize()
        gc.collect()
        assert regions() == before


def test_counters_restart_with_init(instance_factory):
    datadist = instance_factory()
    key = CacheKey(1, 1)
    for _ in range(2):
        manager = datadist.cache_manager
        assert manager.allocate_cache(desc(), [key]).cache_id == 1
        assert manager.register_cache(desc(), tensors_of(desc())).cache_id == 2
        datadist.finalize()
        datadist.init(make_options())


def test_another_object_may_init_after_finalize(instance_factory):
    one = instance_factory(7)
    one.finalize()
    assert instance_factory(7).cache_manager.allocate_cache(desc()).cache_id == 1


def test_context_manager(instance_factory):
    with LLMDataDist(LLMRole.PROMPT, 5) as datadist:
        datadist.init(make_options())
        cache = datadist.cache_manager.allocate_cache(desc())
        assert f"cluster_id={5}" in repr(datadist)
    assert cache.ended
    with pytest.raises(TypeError), LLMDataDist(LLMRole.PROMPT, 5) as datadist:
        datadist.init(1)
    with pytest.raises(RuntimeError):
        datadist.link_clusters([LLMClusterInfo()])


def test_init_and_finalize_from_many_threads(instance_factory):
    datadist = instance_factory()
    errors: list[BaseException] = []

    def cycle() -> None:
        try:
            for _ in range(5):
                datadist.init(make_options())
                datadist.finalize()
        except BaseException as error:  # noqa: BLE001 (reported below)
            errors.append(error)

    threads = [threading.Thread(target=cycle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert LLMDataDist.llm_engine_instance is None


def test_out_of_memory_error_of_a_pool_is_a_memory_error():
    with pytest.raises(LLMOutOfMemoryError) as caught:
        LLMDataDist(LLMRole.PROMPT, 5).init(make_options(pool=0))
    assert isinstance(caught.value, MemoryError)


# -- exit -----------------------------------------------------------------------------------------

HEAD = """
    import sys
    from llm_datadist_torch import *
    from tests.conftest import make_options
    def live(cluster_id):
        datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        datadist.init(make_options())
        return datadist
    first = live(0)
    first.cache_manager.allocate_cache(CacheDesc(1, [1, 1], DataType.DT_INT8))
    first.finalize()
    del first
    for stream in (sys.stdout, sys.stderr):
        print("started", file=stream, flush=True)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Runs a program. Its output is what follows the start, where torch_npu has things to say."""
    program = textwrap.dedent(HEAD) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    # All of it where the start failed.
    done.stdout, done.stderr = (
        text.split("started\n", 1)[-1] for text in (done.stdout, done.stderr)
    )
    return done


@pytest.mark.whole_programs
def test_exit_finalizes_all_live_instances():
    done = run("""
        real = LLMDataDist.finalize
        def finalize(self):
            live = self._instance is not None
            real(self)
            print(self.cluster_id, live, self._instance is None)
        LLMDataDist.finalize = finalize
        a, b = live(1), live(2)
        a.cache_manager.allocate_cache(CacheDesc(2, [2, 2], DataType.DT_INT8))
        c = LLMDataDist(LLMRole.MIX, 3)
    """)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "1 True True", "2 True True"]
    assert done.stderr == ""


@pytest.mark.whole_programs
def test_exit_logs_an_llm_exception():
    done = run("""
        import logging
        logging.basicConfig(stream=sys.stdout)
        a = live(1)
        def close(timeout_ms):
            raise LLMParamError("closing {went} wrong")
        a._instance.close = close
    """)
    assert done.returncode == 0, done.stderr
    assert "closing {went} wrong" in done.stdout
    assert "finalizing cluster 1 at exit failed" in done.stdout


@pytest.mark.whole_programs
def test_exit_with_dropped_instances_is_clean():
    done = run("""
        import gc
        for i in range(3):
            live(i)
        gc.collect()
        print("end")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_shutdown_handler_does_nothing_without_instances():
    assert LLMDataDist.llm_engine_instance is None
    _shutdown_handler()


def test_links_of_a_cpu_cache_need_no_instance():
    assert Cache.create_cpu_cache(host(), tensors_of(host())).cache_id == -1
    assert issubclass(LLMException, RuntimeError)

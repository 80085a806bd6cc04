# SPDX-License-Identifier: Apache-2.0
"""NumPy's integers are taken wherever ints are, and become ints at the border (not in API 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    MemInfo,
    Memtype,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.values import checks
from tests.api.support import data, desc, host, scramble, tensors_of
from tests.asynchronous.helpers import Ready
from tests.conftest import make_options

N = Callable[[int], Any]  # an int, or the same number as another kind of integer
MINE, THEIRS = 11, 12

# -- values: whatever they keep is an int --------------------------------------------------------

VALUES: dict[str, Callable[[N], Any]] = {
    "CacheDesc": lambda n: CacheDesc(
        n(2), [n(4), 8], DataType.DT_INT8, batch_dim_index=n(0), seq_len_dim_index=n(1)
    ),
    "CacheDesc of a tuple": lambda n: CacheDesc(2, (n(4), n(8)), DataType.DT_INT8),
    "CacheKey": lambda n: CacheKey(n(1), n(2), n(3), n(4)),
    "CacheKey by name": lambda n: CacheKey(prompt_cluster_id=n(1), req_id=n(2)),
    "BlocksCacheKey": lambda n: BlocksCacheKey(n(1), model_id=n(2)),
    "CacheKeyByIdAndIndex": lambda n: CacheKeyByIdAndIndex(n(1), n(2), n(3)),
    "TransferConfig": lambda n: TransferConfig(n(1), [n(64), 128], range(n(0), n(1)), n(1)),
    "TransferWithCacheKeyConfig": lambda n: TransferWithCacheKeyConfig(
        CacheKeyByIdAndIndex(1, 2), range(n(1)), range(n(1)), n(3)
    ),
    "MemInfo": lambda n: MemInfo(Memtype.MEM_TYPE_DEVICE, n(64), n(32)),
    "KvCache": lambda n: KvCache.create_cpu_cache(host(2), [n(64), n(128)]),
    "LLMDataDist": lambda n: LLMDataDist(LLMRole.MIX, n(9)),
}


def parts(value: Any) -> list[Any]:
    """Everything in an object, down to numbers."""
    if isinstance(value, dict):
        return parts(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [part for element in value for part in parts(element)]
    return parts(vars(value)) if type(value).__module__.startswith("llm_") else [value]


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint64])
@pytest.mark.parametrize("name", VALUES)
def test_values_keep_ints(name: str, kind: N):
    value = VALUES[name](kind)
    assert repr(value) == repr(VALUES[name](int))
    assert not [part for part in parts(value) if isinstance(part, np.generic)]


def test_a_list_without_them_is_kept_as_it_is():
    shape = [4, 8]
    assert CacheDesc(2, shape, DataType.DT_INT8).shape is shape
    addrs = (64, 128)
    assert TransferConfig(1, addrs).dst_addrs is addrs


def test_config_and_cluster_info():
    config = LLMConfig()
    config.device_id = [np.int32(3)]
    config.sync_kv_timeout = np.int64(1500)
    config.rdma_traffic_class = np.uint8(132)
    config.rdma_service_level = np.uint8(4)
    config.link_total_time = np.int16(7)
    config.link_retry_count = np.int8(2)
    config.output_max_size = np.int64(5)
    options = config.generate_options()
    assert options["ge.exec.deviceId"] == options["ge.session_device_id"] == "3"
    assert sorted(options.values()) == sorted(["0.95", "3", "3", "1500", "132", "4", "7", "2", "5"])
    assert not [part for part in parts(vars(config)) if isinstance(part, np.generic)]

    info = LLMClusterInfo()
    info.remote_cluster_id = np.uint64(2**64 - 1)
    info.append_local_ip_info(np.uint32(16777343), np.uint16(26000))
    info.append_remote_ip_info("127.0.0.1", np.int64(26000))
    assert not [part for part in parts(vars(info)) if isinstance(part, np.generic)]
    assert info.local_ip_info_list == info.remote_ip_info_list


@pytest.mark.parametrize("name", ["uint8", "uint16", "uint32", "uint64", "int32", "int64"])
def test_validators(name: str):
    check = getattr(checks, f"check_{name}")
    largest = np.iinfo(name).max
    for value in (np.int8(1), getattr(np, name)(largest)):
        found = check("x", value)
        assert (type(found), found) == (int, int(value))
    if name != "uint64":
        with pytest.raises(ValueError, match=rf"x={int(largest) + 1} is out of range"):
            check("x", np.uint64(int(largest) + 1))
    with pytest.raises(TypeError, match="only support int"):
        check("x", np.bool_(True))


# -- operations: the same bytes ------------------------------------------------------------------


class World:
    """Two linked instances, and caches of each kind with known bytes."""

    def __init__(self, mine: LLMDataDist, theirs: LLMDataDist) -> None:
        info = LLMClusterInfo()
        info.remote_cluster_id = theirs.cluster_id
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info(*theirs.listen_address)
        self.info, self.datadist = info, mine
        # In nanoseconds it is more than an int32 has: converted before it is used.
        assert mine.link_clusters([info], timeout=np.int32(10_000))[0].name == "LLM_SUCCESS"
        self.manager, other = mine.cache_manager, theirs.cache_manager
        self.rows = self.manager.allocate_cache(desc())
        self.rows2 = self.manager.allocate_cache(desc())
        self.blocks = self.manager.allocate_blocks_cache(desc())
        self.host = self.manager.allocate_blocks_cache(host())
        self.peer_rows = other.allocate_cache(desc())
        self.peer_blocks = other.allocate_blocks_cache(desc(), BlocksCacheKey(THEIRS, 5))

    def caches(self) -> list[Cache]:
        return [cache for cache in vars(self).values() if isinstance(cache, Cache)]

    def row_key(self, n: N, row: int) -> CacheKeyByIdAndIndex:
        return CacheKeyByIdAndIndex(n(THEIRS), n(self.peer_rows.cache_id), n(row))

    def blocks_key(self, n: N) -> BlocksCacheKey:
        return BlocksCacheKey(n(THEIRS), n(5))

    def register(self, n: N) -> None:
        tensors = tensors_of(desc(), 7)
        cache = self.manager.register_cache(desc(), [n(t.data_ptr()) for t in tensors])
        self.manager.copy_cache(self.rows, cache, n(1), n(2))
        self.manager.unregister_cache(n(cache.cache_id))
        assert cache.ended

    def create_cpu_cache(self, n: N) -> None:
        tensors = tensors_of(host(), 9)
        cache = Cache.create_cpu_cache(host(), [n(t.data_ptr()) for t in tensors])
        self.manager.swap_blocks(cache, self.blocks, {n(0): n(3)})

    def transfer(self, n: N) -> None:
        config = TransferConfig(n(THEIRS), [n(a) for a in self.peer_rows.tensor_addrs], None, n(2))
        task = self.manager.transfer_cache_async(self.rows, Ready(), [config])
        assert task.synchronize(n(30_000)).name == "LLM_SUCCESS"
        assert [status.name for status in task.get_results(n(1000))] == ["LLM_SUCCESS"]

    def transfer_blocks(self, n: N) -> None:
        config = TransferWithCacheKeyConfig(self.blocks_key(n), range(n(1)), range(n(1)))
        task = self.manager.transfer_cache_async(
            self.blocks, Ready(), [config], [n(3), n(0)], (n(1), n(2)), n(32)
        )
        assert task.synchronize(30_000).name == "LLM_SUCCESS"


OPERATIONS: dict[str, Callable[[World, N], Any]] = {
    "copy_cache": lambda w, n: w.manager.copy_cache(
        w.rows, w.rows2, n(3), n(1), n(4), n(8), req_id=n(1)
    ),
    "copy_blocks": lambda w, n: w.manager.copy_blocks(w.blocks, {n(0): [n(2), n(3)]}),
    "swap_blocks": lambda w, n: w.manager.swap_blocks(w.blocks, w.host, {n(1): n(2), n(3): n(0)}),
    "pull_cache": lambda w, n: w.manager.pull_cache(w.row_key(n, 2), w.rows, n(1), n(20)),
    "pull_blocks": lambda w, n: w.manager.pull_blocks(
        w.blocks_key(n), w.blocks, [n(0), 1], (n(3), n(2)), tensor_num_per_layer=n(1)
    ),
    "pull_blocks of a row": lambda w, n: w.manager.pull_blocks(
        w.row_key(n, 3), w.blocks, dst_blocks=[n(3)]
    ),
    "push_cache": lambda w, n: w.manager.push_cache(
        w.row_key(n, 2), w.rows, n(1), size=n(-1), tensor_num_per_layer=n(2)
    ),
    "push_blocks": lambda w, n: w.manager.push_blocks(
        w.blocks_key(n), w.blocks, [n(0)], [n(3)], range(n(1), n(2)), range(n(0), n(1)), n(1)
    ),
    "pull_blocks_async": lambda w, n: w.manager.pull_blocks_async(
        w.blocks_key(n), w.blocks, [n(1)], [n(0)]
    ).synchronize(),
    "register and unregister": World.register,
    "create_cpu_cache": World.create_cpu_cache,
    "transfer_cache_async": World.transfer,
    "transfer_cache_async of blocks": World.transfer_blocks,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    instances = [LLMDataDist(LLMRole.MIX, np.int64(cluster_id)) for cluster_id in (MINE, THEIRS)]
    for instance in instances:
        instance.init(make_options())
    yield World(*instances)
    for instance in instances:
        instance.finalize()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_move_the_same_bytes(world: World, name: str):
    found = []
    for kind in (int, np.int64):
        for seed, cache in enumerate(world.caches()):
            scramble(cache.tensors, seed)
        before = [data(cache) for cache in world.caches()]
        OPERATIONS[name](world, kind)
        found.append([data(cache) for cache in world.caches()])
        assert found[-1] != before
    assert found[0] == found[1]


def test_layers_and_blocks_of_a_cache(world: World):
    # 200 * 2 is more than a uint8 has: converted before it is used.
    many = world.manager.allocate_cache(CacheDesc(402, [2, 4], DataType.DT_INT8))
    wanted = [tensor.data_ptr() for tensor in many.tensors[400:402]]
    assert [t.data_ptr() for t in many.layer(np.uint8(200), np.uint8(2))] == wanted
    assert torch.equal(world.rows.block(np.int64(2))[1], world.rows.tensors[1][2])


@pytest.mark.parametrize(
    "call",
    [
        lambda w, n: w.manager.copy_blocks(w.blocks, {0: [n]}),
        lambda w, n: w.manager.swap_blocks(w.blocks, w.host, {0: n}),
        lambda w, n: w.manager.pull_blocks(w.blocks_key(int), w.blocks, [n], [0]),
        lambda w, n: w.manager.pull_cache(w.row_key(int, 0), w.rows, n),
        lambda w, n: w.manager.register_cache(desc(), [n, n]),
        lambda w, n: Cache.create_cpu_cache(host(), [n, n]),
        lambda w, n: TransferConfig(1, [n, 1]),
        lambda w, n: MemInfo(Memtype.MEM_TYPE_DEVICE, n, 1),
        lambda w, n: CacheDesc(1, [n], DataType.DT_INT8),
        lambda w, n: CacheKey(n, 1),
        lambda w, n: w.datadist.link_clusters([w.info], n),
        lambda w, n: w.manager.unregister_cache(n),
    ],
)
@pytest.mark.parametrize("value", [np.bool_(True), np.float64(1)], ids=repr)
def test_bools_and_floats_of_numpy_are_none(world: World, call: Any, value: Any):
    with pytest.raises(TypeError):
        call(world, value)


def test_out_of_range_ids_are_shown_as_plain_numbers(world: World):
    with pytest.raises(ValueError, match=r"\b18446744073709551615\b"):
        world.manager.copy_blocks(world.blocks, {0: [np.uint64(2**64 - 1)]})

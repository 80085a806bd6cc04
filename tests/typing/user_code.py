# SPDX-License-Identifier: Apache-2.0
"""Code as users write it, which mypy and pyright must accept (``make lint``); it is never run."""

from __future__ import annotations

import asyncio
import threading

import torch
from typing_extensions import assert_type

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheManager,
    CacheTask,
    DataType,
    EventSynchronizer,
    LayerSynchronizer,
    LinkListener,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    LLMTimeoutError,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
    install,
)

install()


def configured() -> dict[str, str]:
    config = LLMConfig()
    config.device_id = 0
    config.device_id = [0]
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = False
    config.sync_kv_timeout = 5000
    config.sync_kv_timeout = "5000"
    config.listen_ip_info = "127.0.0.1:26000"
    config.mem_pool_cfg = '{"memory_size": 1048576}'
    config.rdma_traffic_class = 132
    config.link_total_time = 10
    config.mem_utilization = 0.5
    config.ge_options = {"a": "b"}
    assert_type(config.link_retry_count, int)
    assert_type(config.options, dict[str, str])
    return config.generate_options()


def linked() -> LLMDataDist:
    datadist = LLMDataDist(LLMRole.DECODER, 2)
    datadist.init(configured())
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = 1
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info(16777343, 26000)
    status, results = datadist.link_clusters([cluster], timeout=2000)
    assert_type(status, LLMStatusCode)
    assert_type(results, list[LLMStatusCode])
    listener = datadist.on_link_event(lambda event: print(event.peer, event.kind == "lost"))
    assert_type(listener, LinkListener)
    listener.remove()
    datadist.unlink_clusters((cluster,), force=True)
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:0"})
    address = datadist.listen_address
    if address is not None:
        assert_type(address, tuple[str, int])
    return datadist


def caches(manager: CacheManager) -> tuple[Cache, Cache]:
    desc = CacheDesc(4, [16, 128], DataType.DT_FLOAT16, Placement.DEVICE)
    also = CacheDesc(4, (16, 128), torch.bfloat16, placement=Placement.HOST, seq_len_dim_index=1)
    rows = manager.allocate_cache(desc, [CacheKey(1, 10), CacheKey(cluster_id=1, req_id=11)])
    with manager.allocate_blocks_cache(desc, BlocksCacheKey(prompt_cluster_id=1)) as blocks:
        key, value = blocks.layer(0)
        assert_type(key, torch.Tensor)
        value.zero_()
    tensors = [torch.zeros(16, 128) for _ in range(4)]
    registered = manager.register_cache(desc, tensors, remote_accessible=True)
    manager.register_blocks_cache(desc, [tensor.data_ptr() for tensor in tensors])
    assert_type(registered.tensors, tuple[torch.Tensor, ...])
    assert_type(registered.tensor_addrs, list[int])
    manager.unregister_cache(registered.cache_id)
    manager.remove_cache_key(CacheKey(1, 10, model_id=3))
    manager.deallocate_cache(rows)
    manager.remap_registered_memory([MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 2)])
    return blocks, Cache.create_cpu_cache(also, tensors)


def moves(manager: CacheManager, blocks: Cache, host: Cache, rows: Cache) -> None:
    manager.swap_blocks(blocks, host, {0: 1, 2: 3})
    manager.swap_blocks(host, blocks, torch.tensor([[0, 1]]))
    manager.copy_blocks(blocks, {0: [1, 2]})
    manager.copy_cache(rows, rows, 0, 1, offset=16, size=32)
    by_id = CacheKeyByIdAndIndex(1, cache_id=1, batch_index=2)
    manager.pull_cache(CacheKey(1, 10), rows, 0, 64)
    manager.pull_cache(by_id, rows, src_layer_range=range(1), dst_layer_range=range(1, 2))
    manager.pull_blocks(BlocksCacheKey(1, 0), blocks, [0, 1], (2, 3), tensor_num_per_layer=2)
    manager.pull_blocks(by_id, blocks, dst_blocks=torch.tensor([1, 0]))
    manager.push_cache(by_id, rows, 1, range(2), range(2))
    manager.push_blocks(BlocksCacheKey(1), blocks, [0], [1])


class Steps(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return layer_index >= 0


async def background(manager: CacheManager, blocks: Cache, rows: Cache) -> None:
    key_config = TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1))
    task = manager.transfer_cache_async(blocks, Steps(), [key_config], [0], [1])
    assert_type(task, CacheTask)
    assert_type(task.synchronize(100), LLMStatusCode)
    assert_type(task.get_results(), list[LLMStatusCode | None])
    ready = EventSynchronizer([threading.Event() for _ in range(2)])
    config = TransferConfig(1, [1, 2], src_layer_range=range(1))
    config.src_batch_index = 1
    later = manager.transfer_cache_async(rows, ready, (config,))
    ready.record(0)
    assert_type(await later, LLMStatusCode)
    pulls = [manager.pull_blocks_async(BlocksCacheKey(1), blocks, [0], [at]) for at in range(3)]
    statuses = await asyncio.gather(*pulls)
    assert_type(statuses, list[LLMStatusCode])
    pulls[0].add_done_callback(lambda done: print(done.exception(), done.layers_done))
    if not pulls[0].done():
        pulls[0].cancel()


def failures(manager: CacheManager, rows: Cache) -> LLMStatusCode:
    try:
        manager.pull_cache(CacheKey(1, 10), rows)
    except LLMTimeoutError as error:
        return error.status_code
    except LLMException as error:
        assert_type(error.peer, int | None)
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS

# SPDX-License-Identifier: Apache-2.0
"""The engine is chosen by transfer_backend: both sides listen, both link, both pull and push."""

from __future__ import annotations

import torch.distributed as dist
import torch_npu
from common import (
    IP,
    PORT,
    addresses,
    cluster_of,
    expect,
    finish,
    in_pages,
    link_clusters,
    number,
    numbers,
    start,
)
from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)

TENSORS, ROWS, WIDTH = 4, 6, 256
DESC = CacheDesc(TENSORS, [ROWS, WIDTH], DataType.DT_FLOAT)
BLOCKS, CONTIGUOUS = 1, 2  # cache ids
FIRST = {0: 0, 1: 100_000}
SHAPE = (ROWS, WIDTH)


class Computed(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def run(datadist: LLMDataDist, me: int, other: int) -> None:
    manager = datadist.cache_manager
    blocks, rows = (in_pages(TENSORS, ROWS, WIDTH) for _ in range(2))
    for tensors in (blocks, rows):
        number(tensors, FIRST[me])
    paged = manager.register_blocks_cache(DESC, addresses(blocks), BlocksCacheKey(me, 0))
    contiguous = manager.register_cache(DESC, addresses(rows))
    dist.barrier()
    link_clusters(datadist, cluster_of(other, PORT + other, PORT + me))
    dist.barrier()

    manager.pull_blocks(BlocksCacheKey(other, 0), paged, [0], [5])
    manager.push_blocks(BlocksCacheKey(other, 0), paged, [1], [4])
    manager.pull_cache(CacheKeyByIdAndIndex(other, CONTIGUOUS, 1), contiguous, 5)
    manager.push_cache(CacheKeyByIdAndIndex(other, CONTIGUOUS, 4), contiguous, 2)
    layers = range(1, 2)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(other, 0), layers, layers)
    task = manager.transfer_cache_async(paged, Computed(), [config], [2], [3])
    if task.synchronize() != LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"sent: {task.get_results()}")
    dist.barrier()
    torch_npu.npu.synchronize()
    for at in range(TENSORS):
        theirs = numbers(SHAPE, FIRST[other] + 1000 * at)
        mine = numbers(SHAPE, FIRST[me] + 1000 * at)
        third = theirs[2] if at >= 2 else mine[3]
        expect(f"blocks of tensor {at}", blocks[at][[5, 4]], theirs[[0, 1]])
        expect(f"layer-wise in tensor {at}", blocks[at][3], third)
        expect(f"rows of tensor {at}", rows[at][[5, 4]], theirs[[1, 2]])

    dist.barrier()
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = other
    cluster.append_local_ip_info(IP, PORT + me)
    status, results = datadist.unlink_clusters([cluster], 60000)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"unlink_clusters: {status}, {results}")
    dist.barrier()
    for cache in (paged, contiguous):
        manager.unregister_cache(cache.cache_id)


if __name__ == "__main__":
    rank, device = start()
    options = LLMConfig()
    options.device_id = device
    options.enable_cache_manager = True
    options.enable_remote_cache_accessible = True
    options.listen_ip_info = f"{IP}:{PORT + rank}"
    options.transfer_backend = "hixl"
    options.sync_kv_timeout = 60000
    this = LLMDataDist(LLMRole.MIX, rank)
    this.init(options.generate_options())
    run(this, rank, 1 - rank)
    finish(this)

# SPDX-License-Identifier: Apache-2.0
"""A prompt pushes blocks into a pool cache of a decoder; both listen, at ports side by side."""

from __future__ import annotations

import torch
import torch.distributed as dist
from common import (
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
    start_datadist,
    unlink_clusters,
)
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMRole,
    Placement,
)

PROMPT, DECODER = 1, 2
TENSORS, BLOCKS, WIDTH = 4, 8, 256
SHAPE = [BLOCKS, WIDTH]


def run_prompt(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, BLOCKS, WIDTH)
    number(tensors, 0)
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_FLOAT, Placement.DEVICE)
    cache = manager.register_blocks_cache(
        desc, addresses(tensors), BlocksCacheKey(PROMPT, 0), remote_accessible=True
    )
    dist.barrier()
    decoder = cluster_of(DECODER, PORT + 1, PORT)
    link_clusters(datadist, decoder)
    key = BlocksCacheKey(DECODER, 0)
    both, last = range(2), range(1, 2)
    manager.push_blocks(key, cache, [0, 1, 5], [2, 3, 7], both, both, tensor_num_per_layer=2)
    manager.push_blocks(
        key, cache, src_blocks=[4], dst_blocks=[4], src_layer_range=last, dst_layer_range=last
    )
    dist.barrier()
    dist.barrier()
    unlink_clusters(datadist, decoder)
    manager.unregister_cache(cache.cache_id)


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_FLOAT, Placement.DEVICE)
    cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(DECODER, 0))
    dist.barrier()
    dist.barrier()
    # The pool is seen by swapping it out.
    host = [torch.zeros(*SHAPE).pin_memory() for _ in range(TENSORS)]
    host_desc = CacheDesc(TENSORS, SHAPE, DataType.DT_FLOAT, Placement.HOST)
    manager.swap_blocks(
        cache, Cache.create_cpu_cache(host_desc, addresses(host)), {2: 2, 3: 3, 4: 4, 7: 7}
    )
    for at, tensor in enumerate(host):
        source = numbers(SHAPE, 1000 * at)
        expect(f"blocks of tensor {at}", tensor[[2, 3, 7]], source[[0, 1, 5]])
        if at >= 2:
            expect(f"block 4 of tensor {at}", tensor[4], source[4])
    dist.barrier()
    manager.deallocate_blocks_cache(cache)


if __name__ == "__main__":
    rank, device = start()
    if rank == 0:
        this = start_datadist(LLMRole.PROMPT, PROMPT, device, port=PORT, remote=True)
        run_prompt(this)
    else:
        this = start_datadist(
            LLMRole.DECODER, DECODER, device, port=PORT + 1, remote=True, pool=16 << 20
        )
        run_decoder(this)
    finish(this)

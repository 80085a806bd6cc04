# SPDX-License-Identifier: Apache-2.0
"""A decoder that only dials pulls rows into the blocks of its cache.

It has no listen_ip_info: what it is reached at stands in its LLMClusterInfo, with port 0.
"""

from __future__ import annotations

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
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMRole,
)

PROMPT, DECODER = 1, 2
TENSORS, ROWS, WIDTH = 2, 3, 320  # a row is two blocks and a half
BLOCKS, BLOCK = 9, 128


def run_prompt(datadist: LLMDataDist) -> None:
    tensors = in_pages(TENSORS, ROWS, WIDTH)
    number(tensors, 0)
    desc = CacheDesc(TENSORS, [ROWS, WIDTH], DataType.DT_FLOAT)
    keys = [CacheKey(PROMPT, req_id=50 + row) for row in range(ROWS)]
    cache = datadist.cache_manager.register_cache(desc, addresses(tensors), keys)
    dist.barrier()
    dist.barrier()
    datadist.cache_manager.unregister_cache(cache.cache_id)


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, BLOCKS, BLOCK)
    desc = CacheDesc(TENSORS, [BLOCKS, BLOCK], DataType.DT_FLOAT)
    cache = manager.register_blocks_cache(desc, addresses(tensors))
    dist.barrier()
    prompt = cluster_of(PROMPT, PORT)
    link_clusters(datadist, prompt)
    manager.pull_blocks(CacheKey(PROMPT, 51), cache, [], [8, 0, 3])
    manager.pull_blocks(CacheKeyByIdAndIndex(PROMPT, 1, 2), cache, dst_blocks=[5])
    for at, tensor in enumerate(tensors):
        source = numbers((ROWS, WIDTH), 1000 * at)
        expect(f"blocks of tensor {at}", tensor[[8, 0]].flatten(), source[1, : 2 * BLOCK])
        expect(f"tail in tensor {at}", tensor[3, : WIDTH - 2 * BLOCK], source[1, 2 * BLOCK :])
        expect(f"row by its index in tensor {at}", tensor[5], source[2, :BLOCK])
    unlink_clusters(datadist, prompt)
    dist.barrier()


if __name__ == "__main__":
    rank, device = start()
    if rank == 0:
        this = start_datadist(LLMRole.PROMPT, PROMPT, device, port=PORT)
        run_prompt(this)
    else:
        this = start_datadist(LLMRole.DECODER, DECODER, device)
        run_decoder(this)
    finish(this)

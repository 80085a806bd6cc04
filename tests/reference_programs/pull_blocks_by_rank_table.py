# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls blocks and swaps them; both link by a rank table 1.2 of several servers.

The table has addresses of the devices' network only, which no host listens on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_npu
from common import (
    addresses,
    device_of,
    expect,
    finish,
    in_pages,
    link_by_table,
    number,
    numbers,
    start,
    start_datadist,
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

PROMPT, DECODER = 3, 8  # cluster ids, in the order of their ranks
TENSORS, BLOCKS, WIDTH = 4, 10, 128
SOURCE, TARGET = [2, 3, 4, 9], [0, 1, 7, 5]


def link(datadist: LLMDataDist) -> int:
    servers = [{"server_id": str(rank), "device": [device_of(rank)]} for rank in range(2)]
    table = {
        "version": "1.2",
        "status": "completed",
        "server_count": "2",
        "server_list": servers,
        "super_pod_list": [
            {"super_pod_id": "0", "server_list": [{"server_id": "0"}, {"server_id": "1"}]}
        ],
    }
    return link_by_table(datadist, "blocks", {PROMPT: 0, DECODER: 1}, table)


def run_prompt(datadist: LLMDataDist) -> None:
    tensors = in_pages(TENSORS, BLOCKS, WIDTH)
    number(tensors, 0)
    desc = CacheDesc(TENSORS, [BLOCKS, WIDTH], DataType.DT_FLOAT)
    key = BlocksCacheKey(PROMPT, 0)
    cache = datadist.cache_manager.register_blocks_cache(desc, addresses(tensors), key)
    comm_id = link(datadist)
    dist.barrier()
    datadist.unlink(comm_id)
    datadist.cache_manager.unregister_cache(cache.cache_id)


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, BLOCKS, WIDTH)
    desc = CacheDesc(TENSORS, [BLOCKS, WIDTH], DataType.DT_FLOAT)
    cache = manager.register_blocks_cache(desc, addresses(tensors))
    comm_id = link(datadist)
    manager.pull_blocks(BlocksCacheKey(PROMPT, 0), cache, SOURCE, TARGET)
    one = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    manager.pull_blocks(BlocksCacheKey(PROMPT, 0), cache, [6], [6], **one)
    for at, tensor in enumerate(tensors):
        source = numbers((BLOCKS, WIDTH), 1000 * at)
        expect(f"blocks of tensor {at}", tensor[TARGET], source[SOURCE])
        other = numbers((BLOCKS, WIDTH), 1000 * (at + 2))[6] if at < 2 else torch.zeros(WIDTH)
        expect(f"block 6 of tensor {at}", tensor[6], other)

    host = [torch.zeros(BLOCKS, WIDTH).pin_memory() for _ in range(TENSORS)]
    desc = CacheDesc(TENSORS, [BLOCKS, WIDTH], DataType.DT_FLOAT, Placement.HOST)
    swapped = Cache.create_cpu_cache(desc, addresses(host))
    manager.swap_blocks(cache, swapped, {0: 9, 1: 8})
    manager.swap_blocks(swapped, cache, {9: 2, 8: 3})
    manager.copy_blocks(cache, {7: [8, 9]})
    torch_npu.npu.synchronize()
    for at, tensor in enumerate(tensors):
        source = numbers((BLOCKS, WIDTH), 1000 * at)
        expect(f"swapped blocks of tensor {at}", host[at][[9, 8]], source[[2, 3]])
        expect("swapped in and copied", tensor[[2, 3, 8, 9]], source[[2, 3, 4, 4]])
    dist.barrier()
    datadist.unlink(comm_id)
    manager.unregister_cache(cache.cache_id)


if __name__ == "__main__":
    rank, device = start()
    if rank == 0:
        this = start_datadist(LLMRole.PROMPT, PROMPT, device)
        run_prompt(this)
    else:
        this = start_datadist(LLMRole.DECODER, DECODER, device)
        run_decoder(this)
    finish(this)

# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls rows of a pool cache and of registered tensors; both link by rank table 1.0.

Neither listens. They link, part and link again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

PROMPT, DECODER = 0, 1
TENSORS, ROWS, WIDTH = 4, 4, 200
DESC = CacheDesc(TENSORS, [ROWS, WIDTH], DataType.DT_FLOAT)


def link(datadist: LLMDataDist) -> int:
    table = {
        "version": "1.0",
        "status": "completed",
        "server_count": "1",
        "server_list": [{"server_id": "node", "device": [device_of(0), device_of(1)]}],
    }
    return link_by_table(datadist, "rows", {PROMPT: 0, DECODER: 1}, table)


def run_prompt(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, ROWS, WIDTH)
    number(tensors, 0)
    registered = manager.register_cache(DESC, addresses(tensors))
    keys = [CacheKey(PROMPT, req_id=row, model_id=0) for row in range(ROWS)]
    pooled = manager.allocate_cache(DESC, keys)
    for row in range(ROWS):  # in the pool they are the other way round
        manager.copy_cache(pooled, registered, ROWS - 1 - row, row)
    dist.barrier()
    comm_id = link(datadist)
    dist.barrier()
    datadist.unlink(comm_id)
    link(datadist)
    dist.barrier()
    manager.remove_cache_key(keys[3])
    manager.deallocate_cache(pooled)


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, ROWS, WIDTH)
    cache = manager.register_cache(DESC, addresses(tensors))
    dist.barrier()
    comm_id = link(datadist)
    manager.pull_cache(CacheKey(PROMPT, 1), cache, batch_index=2)
    manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, 1, 3), cache, batch_index=0, size=400)
    for at, tensor in enumerate(tensors):
        source = numbers((ROWS, WIDTH), 1000 * at)
        expect(f"row of the pool in tensor {at}", tensor[2], source[2])
        expect(f"half a registered row in tensor {at}", tensor[0, :100], source[3, :100])
        expect(f"what was not asked for in tensor {at}", tensor[0, 100:], torch.zeros(100))
    dist.barrier()
    datadist.unlink(comm_id)
    link(datadist)
    manager.pull_cache(
        CacheKey(PROMPT, 0), cache, 1, -1, src_layer_range=range(1, 2), dst_layer_range=range(1)
    )
    expect("layer 1 in layer 0", tensors[0][1], numbers((ROWS, WIDTH), 2000)[3])
    try:
        manager.pull_cache(CacheKey(PROMPT, 1), cache)
    except LLMException as error:
        if error.status_code != LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            raise
        print("request 1 is consumed: ok", flush=True)
    dist.barrier()


if __name__ == "__main__":
    rank, device = start()
    role = LLMRole.PROMPT if rank == PROMPT else LLMRole.DECODER
    this = start_datadist(role, rank, device, pool=16 << 20)
    (run_prompt if rank == PROMPT else run_decoder)(this)
    finish(this)

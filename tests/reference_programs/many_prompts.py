# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls blocks of several prompts, whose cluster ids are made from the clock.

Rank 0 is the decoder, which listens nowhere; its id is the largest there is. Each other process
has two prompts.
"""

from __future__ import annotations

import time

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
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist, LLMRole

PROMPTS = 2
"""Per process."""
TENSORS, BLOCKS, WIDTH = 2, 8, 128
DESC = CacheDesc(TENSORS, [BLOCKS, WIDTH], DataType.DT_FLOAT)
DECODER = 2**64 - 1


def first_of(cluster: int) -> int:
    """What the first element of a prompt's cache is; prompts are counted from 0."""
    return 100_000 * cluster


def run_prompts(rank: int, device_id: int) -> list[LLMDataDist]:
    datadists, ids, kept = [], [], []
    for at in range(PROMPTS):
        cluster = (rank - 1) * PROMPTS + at
        ids.append(2**63 + time.time_ns())
        datadist = start_datadist(LLMRole.PROMPT, ids[-1], device_id, port=PORT + cluster)
        tensors = in_pages(TENSORS, BLOCKS, WIDTH)
        number(tensors, first_of(cluster))
        datadist.cache_manager.register_blocks_cache(
            DESC, addresses(tensors), BlocksCacheKey(ids[-1], 0)
        )
        datadists.append(datadist)
        kept.append(tensors)
    dist.gather_object(ids, None, dst=0)
    dist.barrier()
    return datadists


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(TENSORS, BLOCKS, WIDTH)
    cache = manager.register_blocks_cache(DESC, addresses(tensors))
    told: list = [None] * dist.get_world_size()
    dist.gather_object([], told, dst=0)
    ids = [cluster_id for of_rank in told for cluster_id in of_rank]
    clusters = [cluster_of(cluster_id, PORT + at) for at, cluster_id in enumerate(ids)]
    link_clusters(datadist, *clusters)
    for at, cluster_id in enumerate(ids):
        manager.pull_blocks(BlocksCacheKey(cluster_id, 0), cache, [7 - at, 0], [at, at + 4])
    for at in range(len(ids)):
        for index, tensor in enumerate(tensors):
            source = numbers((BLOCKS, WIDTH), first_of(at) + 1000 * index)
            expect(f"tensor {index} of prompt {at}", tensor[[at, at + 4]], source[[7 - at, 0]])
    unlink_clusters(datadist, *clusters)
    dist.barrier()


if __name__ == "__main__":
    rank_of, device = start()
    if rank_of == 0:
        this = [start_datadist(LLMRole.DECODER, DECODER, device)]
        run_decoder(this[0])
    else:
        this = run_prompts(rank_of, device)
    finish(*this)

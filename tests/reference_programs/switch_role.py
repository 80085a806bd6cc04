# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls blocks; then the two switch roles, and it is pulled from.

Each time only the prompt of the moment listens, where its switch_options say.
"""

from __future__ import annotations

import torch.distributed as dist
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
    start_datadist,
    unlink_clusters,
)
from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

TENSORS, BLOCKS, WIDTH = 2, 6, 128
FIRST = {0: 0, 1: 100_000}
"""What the first element of either side's cache is."""


def pull(datadist: LLMDataDist, owner: int, cache: object, tensors: list) -> None:
    other = cluster_of(owner, PORT + owner)
    link_clusters(datadist, other)
    try:
        datadist.switch_role(LLMRole.MIX)
    except LLMException as error:
        if error.status_code != LLMStatusCode.LLM_EXIST_LINK:
            raise
    else:
        raise SystemExit("roles were switched in spite of a link")
    datadist.cache_manager.pull_blocks(BlocksCacheKey(owner, 0), cache, [0, 1], [4, 5])
    for at, tensor in enumerate(tensors):
        source = numbers((BLOCKS, WIDTH), FIRST[owner] + 1000 * at)
        expect(f"blocks of tensor {at} from {owner}", tensor[[4, 5]], source[[0, 1]])
    unlink_clusters(datadist, other)


def run(datadist: LLMDataDist, rank: int) -> None:
    tensors = in_pages(TENSORS, BLOCKS, WIDTH)
    number(tensors, FIRST[rank])
    desc = CacheDesc(TENSORS, [BLOCKS, WIDTH], DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_blocks_cache(
        desc, addresses(tensors), BlocksCacheKey(rank, 0)
    )
    dist.barrier()
    if rank == 1:
        pull(datadist, 0, cache, tensors)
    dist.barrier()
    if rank == 0:
        datadist.switch_role(LLMRole.DECODER)
    else:
        config = LLMConfig()
        config.listen_ip_info = f"{IP}:{PORT + 1}"
        datadist.switch_role(LLMRole.PROMPT, config.generate_options())
    dist.barrier()
    if rank == 0:
        pull(datadist, 1, cache, tensors)
    dist.barrier()
    datadist.cache_manager.unregister_cache(cache.cache_id)


if __name__ == "__main__":
    number_of, device = start()
    if number_of == 0:
        this = start_datadist(LLMRole.PROMPT, 0, device, port=PORT)
    else:
        this = start_datadist(LLMRole.DECODER, 1, device)
    run(this, number_of)
    finish(this)

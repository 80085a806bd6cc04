# SPDX-License-Identifier: Apache-2.0
"""A prompt that doesn't listen pushes rows to a decoder, whole and layer by layer.

The decoder registers a second cache when they are linked already.
"""

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
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMDataDist,
    LLMException,
    LLMRole,
)

PROMPT, DECODER = 0, 1
LAYERS, ROWS, WIDTH = 2, 4, 384
DESC = CacheDesc(2 * LAYERS, [ROWS, WIDTH], DataType.DT_FLOAT)


def run_prompt(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(2 * LAYERS, ROWS, WIDTH)
    number(tensors, 0)
    cache = manager.register_cache(DESC, addresses(tensors), remote_accessible=True)
    dist.barrier()
    decoder = cluster_of(DECODER, PORT)
    link_clusters(datadist, decoder)
    dist.barrier()  # the decoder registers its second cache
    dist.barrier()
    manager.push_cache(CacheKeyByIdAndIndex(DECODER, 1, 0), cache, 3)
    for layer in range(LAYERS):
        one = range(layer, layer + 1)
        manager.push_cache(CacheKeyByIdAndIndex(DECODER, 2, 1), cache, 2, one, one)
    last, first = range(LAYERS - 1, LAYERS), range(1)
    manager.push_cache(CacheKeyByIdAndIndex(DECODER, 2, 2), cache, 1, last, first)
    try:
        manager.push_cache(CacheKeyByIdAndIndex(DECODER, 1, ROWS), cache, 0)
    except LLMException as error:
        print(f"row {ROWS} is refused: {error.status_code}", flush=True)
    else:
        raise SystemExit("a row that the decoder has not was pushed")
    unlink_clusters(datadist, decoder)
    dist.barrier()
    manager.unregister_cache(cache.cache_id)


def run_decoder(datadist: LLMDataDist) -> None:
    manager = datadist.cache_manager
    before, afterwards = (in_pages(2 * LAYERS, ROWS, WIDTH) for _ in range(2))
    caches = [manager.register_cache(DESC, addresses(before), remote_accessible=True)]
    dist.barrier()
    dist.barrier()
    caches.append(manager.register_cache(DESC, addresses(afterwards), remote_accessible=True))
    dist.barrier()
    dist.barrier()
    for at in range(2 * LAYERS):
        source = numbers((ROWS, WIDTH), 1000 * at)
        expect(f"row 3 of tensor {at}", before[at][0], source[3])
        expect(f"row 2 of tensor {at}, by layers", afterwards[at][1], source[2])
        other = numbers((ROWS, WIDTH), 1000 * (at + 2))[1] if at < 2 else torch.zeros(WIDTH)
        expect(f"the last layer in tensor {at}", afterwards[at][2], other)
    for cache in caches:
        manager.unregister_cache(cache.cache_id)


if __name__ == "__main__":
    rank, device = start()
    if rank == PROMPT:
        this = start_datadist(LLMRole.PROMPT, PROMPT, device, remote=True)
        run_prompt(this)
    else:
        this = start_datadist(LLMRole.DECODER, DECODER, device, port=PORT, remote=True)
        run_decoder(this)
    finish(this)

# SPDX-License-Identifier: Apache-2.0
"""A prompt sends each layer to two decoders when it is computed: rows, blocks, and all blocks.

To rank 1 it gives addresses, in two-sided mode; nobody has registered a key.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_npu
from common import (
    PORT,
    addresses,
    cluster_of,
    expect,
    finish,
    in_pages,
    link_clusters,
    numbers,
    start,
    start_datadist,
    unlink_clusters,
)
from llm_datadist import (
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)

LAYERS, BLOCKS, WIDTH = 3, 4, 256
DESC = CacheDesc(2 * LAYERS, [BLOCKS, WIDTH], DataType.DT_FLOAT)
SHAPE = (BLOCKS, WIDTH)
ROWS = CacheDesc(2 * LAYERS, [BLOCKS // 2, 2 * WIDTH], DataType.DT_FLOAT)
"""The same numbers as rows, of two blocks each."""


class Computes(LayerSynchronizer):
    """Computes a layer when it is asked for, and waits for the event at its end."""

    def __init__(self, tensors: list[torch.Tensor], device_id: int) -> None:
        self._tensors = tensors
        self._device_id = device_id

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        torch_npu.npu.set_device(self._device_id)
        for at in (2 * layer_index, 2 * layer_index + 1):
            tensor = self._tensors[at]
            tensor.copy_(numbers(tensor.shape, 1000 * at), non_blocking=True)
        event = torch_npu.npu.Event()
        event.record()
        event.synchronize()
        return True


def gathered(mine: list[int]) -> list[list[int]]:
    everybody: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def send(manager, cache, tensors, device_id, configs, *further) -> None:
    for tensor in tensors:
        tensor.zero_()
    task = manager.transfer_cache_async(cache, Computes(tensors, device_id), configs, *further)
    status = task.synchronize()
    if status != LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"sent: {status}, {task.get_results()}")
    if task.get_results(1000) != [LLMStatusCode.LLM_SUCCESS] * len(configs):
        raise SystemExit(f"sent: {task.get_results()}")
    dist.barrier()
    dist.barrier()


def run_prompt(datadist: LLMDataDist, device_id: int) -> None:
    manager = datadist.cache_manager
    rows = in_pages(2 * LAYERS, *ROWS.shape)
    blocks = in_pages(2 * LAYERS, *SHAPE)
    contiguous = manager.register_cache(ROWS, addresses(rows))
    paged = manager.register_blocks_cache(DESC, addresses(blocks))
    targets = gathered([])
    clusters = [cluster_of(rank, PORT + rank, PORT) for rank in (1, 2)]
    link_clusters(datadist, *clusters)

    second = [address + WIDTH * 4 for address in targets[2]]  # from block 1 on
    rows_to = [TransferConfig(1, targets[1], range(LAYERS), 1), TransferConfig(2, second)]
    send(manager, contiguous, rows, device_id, rows_to)
    some = [TransferConfig(1, targets[1][2:4], range(1, 2)), TransferConfig(2, targets[2])]
    send(manager, paged, blocks, device_id, some, [0, 3], [3, 1])
    everything = [TransferConfig(rank, targets[rank]) for rank in (1, 2)]
    send(manager, paged, blocks, device_id, everything)
    into_blocks = [TransferConfig(1, targets[1]), TransferConfig(2, targets[2])]
    send(manager, contiguous, rows, device_id, into_blocks, None, [2, 0], WIDTH * 4)

    unlink_clusters(datadist, *clusters)
    dist.barrier()
    manager.unregister_cache(contiguous.cache_id)
    manager.unregister_cache(paged.cache_id)


def run_decoder(datadist: LLMDataDist, rank: int) -> None:
    manager = datadist.cache_manager
    tensors = in_pages(2 * LAYERS, BLOCKS, WIDTH)
    cache = manager.register_blocks_cache(DESC, addresses(tensors))
    gathered(addresses(tensors))

    def look(what: str, wanted) -> None:
        dist.barrier()
        for at, tensor in enumerate(tensors):
            expect(f"{what} of tensor {at}", tensor, wanted(at, numbers(SHAPE, 1000 * at)))
            tensor.zero_()
        torch_npu.npu.synchronize()
        dist.barrier()

    def row(_: int, source: torch.Tensor) -> torch.Tensor:
        wanted = torch.zeros(SHAPE)
        at, first = (0, 2) if rank == 1 else (1, 0)
        wanted[at : at + 2] = source[first : first + 2]
        return wanted

    def some(at: int, source: torch.Tensor) -> torch.Tensor:
        wanted = torch.zeros(SHAPE)
        if rank == 2 or at in (2, 3):
            wanted[[3, 1]] = source[[0, 3]]
        return wanted

    def pieces(_: int, source: torch.Tensor) -> torch.Tensor:
        wanted = torch.zeros(SHAPE)
        wanted[[2, 0]] = source[:2]
        return wanted

    look("a row", row)
    look("two blocks", some)
    look("all blocks", lambda _, source: source)
    look("a row in blocks", pieces)
    dist.barrier()
    manager.unregister_cache(cache.cache_id)


if __name__ == "__main__":
    number, device = start()
    role = LLMRole.DECODER if number else LLMRole.PROMPT
    this = start_datadist(role, number, device, port=PORT + number)
    if number:
        run_decoder(this, number)
    else:
        run_prompt(this, device)
    finish(this)

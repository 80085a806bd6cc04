# SPDX-License-Identifier: Apache-2.0
"""The other process of ``doctor --npu-selftest``: an instance that does what stdin says."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from llm_datadist_torch import BlocksCacheKey, Cache, CacheDesc, LLMDataDist
from llm_datadist_torch.cli.selftest_steps import (
    BLOCK_BYTES,
    BLOCKS,
    PEER,
    pattern,
    start,
    sum_of,
)


class Peer:
    """Its commands are its methods."""

    def __init__(self, datadist: LLMDataDist, device: str) -> None:
        self._datadist = datadist
        self._device = device
        self._cache = self._make(BLOCKS, BLOCK_BYTES, 0)
        for tensor in self._cache.tensors:
            tensor.copy_(pattern())
        self._registered: Cache | None = None
        torch.accelerator.synchronize()

    def _make(self, count: int, size: int, name: int) -> Cache:
        desc = CacheDesc(2, [count, size], torch.uint8)
        return self._datadist.cache_manager.allocate_blocks_cache(desc, BlocksCacheKey(PEER, name))

    def listen(self) -> int:
        """Where it listens."""
        address = self._datadist.listen_address
        return 0 if address is None else address[1]

    def sum(self) -> int:
        """What the first tensor holds."""
        return sum_of(self._cache.tensors[0].cpu())

    def register(self, name: int) -> None:
        """A cache over tensors of the program, which nobody has seen before."""
        tensors = [pattern().to(self._device) for _ in range(2)]
        torch.accelerator.synchronize()
        desc = CacheDesc(2, [BLOCKS, BLOCK_BYTES], torch.uint8)
        self._registered = self._datadist.cache_manager.register_blocks_cache(
            desc, tensors, BlocksCacheKey(PEER, name)
        )

    def unregister(self) -> None:
        """End that cache."""
        if self._registered is not None:
            self._datadist.cache_manager.unregister_cache(self._registered.cache_id)

    def allocate(self, count: int, size: int) -> None:
        """A cache of other blocks, which is called by their size."""
        self._make(count, size, size)


def main(device_id: int, transport: str) -> None:
    """Answer line by line until stdin ends."""
    with start(PEER, device_id, transport) as datadist:
        peer = Peer(datadist, f"npu:{device_id}")
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer: Any = getattr(peer, name)(*arguments)
            print("ANSWER " + json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

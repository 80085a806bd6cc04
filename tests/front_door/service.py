# SPDX-License-Identifier: Apache-2.0
"""A node in another process, told what to do by name."""

from __future__ import annotations

from typing import Any

import torch

import llm_datadist_torch as ld
from tests.devices import finish_kernels, raw


class NodeService:
    """One node; everything that goes in and out can be pickled."""

    node: ld.Node | None = None

    def open(self, **options: Any) -> str | None:
        self.node = ld.open(**{"listen": "127.0.0.1:0", "timeout_s": 20.0, **options})
        return self.node.address

    def allocate(self, **arguments: Any) -> int:
        """Each element holds the number of its tensor and of its block or row."""
        self.cache = self.node.allocate(**arguments)
        paint(self.cache)
        return self.cache.cache_id

    def data(self) -> list[bytes]:
        finish_kernels()
        return [raw(tensor) for tensor in self.cache.tensors]

    def connect(self, address: str, **arguments: Any) -> int:
        return self.node.connect(address, **arguments).cluster_id

    def pull_from(self, cluster_id: int, *args: Any, **kwargs: Any) -> None:
        self.node.peer(cluster_id).pull(*args, into=self.cache, **kwargs)

    def links(self) -> dict[int, str]:
        return {info.peer: info.state for info in self.node.datadist.links()}

    def close(self) -> None:
        self.node.close()

    def finish(self) -> None:
        if self.node is not None:
            self.node.close()


def paint(cache: ld.Cache, plus: int = 0) -> None:
    for number, tensor in enumerate(cache.tensors):
        rows = torch.arange(len(tensor), device=tensor.device).view(-1, *[1] * (tensor.dim() - 1))
        tensor.copy_((number * 100 + rows + plus).expand_as(tensor))
    finish_kernels()


def values(cache: ld.Cache) -> list[list[int]]:
    """The first element of each block or row, for each tensor."""
    finish_kernels()
    return [[int(row.flatten()[0]) for row in tensor.cpu()] for tensor in cache.tensors]

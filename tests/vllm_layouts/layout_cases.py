# SPDX-License-Identifier: Apache-2.0
"""Synthetic KV of a whole engine, filled token by token, and read back in the same way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_datadist_torch.vllm.layouts import GroupLayout, GroupSpec, KVLayout, describe, heads_of
from llm_datadist_torch.vllm.layouts import Kind as GroupKind

LAYERS = ("model.layers.0", "model.layers.1")


@dataclass(frozen=True)
class Kind:
    """A layout: its arrangement, whether K and V share a tensor, and the width of each part."""

    arrangement: str
    fused: bool
    widths: tuple[int, ...]
    heads: int

    def shape(self, blocks: int, block_size: int, heads: int, part: int) -> tuple[int, ...]:
        if self.fused:
            return blocks, heads, block_size, self.widths[part]
        return blocks, block_size, heads, self.widths[part]


CPU = Kind("cpu/vec", True, (4,), 4)
CPU_AMX = Kind("cpu/amx", True, (4,), 4)
ASCEND = Kind("ascend", False, (3, 3), 4)
MLA = Kind("ascend", False, (5, 2), 1)
SPARSE_MLA = Kind("ascend", False, (5, 2, 3), 1)
KINDS = {"cpu": CPU, "ascend": ASCEND, "mla": MLA, "sparse mla": SPARSE_MLA}


class Worker:
    """One worker's KV."""

    def __init__(
        self, kind: Kind, blocks: int, block_size: int, tp_rank: int = 0, tp_size: int = 1
    ) -> None:
        self.kind, self.block_size = kind, block_size
        heads = max(1, kind.heads // tp_size)
        self.tensors = [
            [
                torch.zeros(kind.shape(blocks, block_size, heads, part))
                for part in range(len(kind.widths))
            ]
            for _ in LAYERS
        ]
        given = {
            name: tensors[0] if kind.fused else tuple(tensors)
            for name, tensors in zip(LAYERS, self.tensors, strict=True)
        }
        self.layout: KVLayout
        self.layout, self.views = describe(
            given,
            [
                GroupSpec(
                    GroupLayout(GroupKind.ATTENTION, block_size),
                    LAYERS,
                    dict.fromkeys(LAYERS, kind.heads),
                )
            ],
            tp_rank=tp_rank,
            tp_size=tp_size,
            arrangement=kind.arrangement,
        )
        self.heads = heads_of(kind.heads, tp_rank, tp_size)

    def vector(self, layer: int, part: int, slot: tuple[int, int], head: int) -> torch.Tensor:
        """What (block, token in it) has of a local head; to read and to write."""
        tensor = self.tensors[layer][part]
        block, token = slot
        if not self.kind.fused:
            return tensor[block, token, head]
        # vLLM's kernels without AMX: first K as [head_dim, tokens], then V as [tokens, head_dim].
        dim = tensor.shape[3] // 2
        keys, values = tensor[block, head].view(2, -1)
        return torch.stack(
            (keys.view(dim, self.block_size)[:, token], values.view(self.block_size, dim)[token])
        )

    def write(self, slot: tuple[int, int], token: int) -> None:
        """Fill a slot with numbers that say which layer, part, head and token it is."""
        for layer in range(len(LAYERS)):
            for part in range(len(self.kind.widths)):
                for at, head in enumerate(self.heads):
                    self._put(layer, part, slot, at, content(self.kind, layer, part, head, token))

    def _put(
        self, layer: int, part: int, slot: tuple[int, int], head: int, numbers: torch.Tensor
    ) -> None:
        tensor = self.tensors[layer][part]
        block, token = slot
        if not self.kind.fused:
            tensor[block, token, head] = numbers
            return
        dim = tensor.shape[3] // 2
        keys, values = tensor[block, head].view(2, -1)
        keys.view(dim, self.block_size)[:, token] = numbers[:dim]
        values.view(self.block_size, dim)[token] = numbers[dim:]

    def has_token(self, slot: tuple[int, int], token: int) -> bool:
        return all(
            torch.equal(
                self.vector(layer, part, slot, at).flatten(),
                content(self.kind, layer, part, head, token),
            )
            for layer in range(len(LAYERS))
            for part in range(len(self.kind.widths))
            for at, head in enumerate(self.heads)
        )

    def is_untouched(self, slot: tuple[int, int]) -> bool:
        return all(
            not self.vector(layer, part, slot, at).any()
            for layer in range(len(LAYERS))
            for part in range(len(self.kind.widths))
            for at in range(len(self.heads))
        )


def content(kind: Kind, layer: int, part: int, head: int, token: int) -> torch.Tensor:
    first = (((layer * 3 + part) * 8 + head) * 1024 + token) * 8 + 1
    return torch.arange(first, first + kind.widths[part], dtype=torch.float32)


def slots(blocks: list[int], block_size: int, tokens: range) -> list[tuple[int, int]]:
    return [(blocks[token // block_size], token % block_size) for token in tokens]

# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Llama whose KV cache lives in the blocks of one `llm_datadist_torch` cache.

`transformers` does the maths; this file only tells it where keys and values are.  A sequence of n
tokens owns ceil(n / block_size) blocks, in any order and anywhere in the cache, and its block table
says which.  Tensor 2*i holds the keys of layer i and tensor 2*i + 1 its values; each has the shape
[num_blocks, block_size, kv_heads, head_dim].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging as transformers_logging

MODEL_DIR = Path(__file__).resolve().parent / "model"
BLOCK_SIZE = 16  # tokens


def load_model(path: Path = MODEL_DIR, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """Loads the model in float32, ready for inference, on one thread.

    One thread per process keeps several processes on a small machine out of each other's way, and
    keeps the order of every sum the same in each of them.
    """
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval().to(device)


def load_config(path: Path = MODEL_DIR) -> LlamaConfig:
    """Loads what describes the model, without its weights."""
    return LlamaConfig.from_pretrained(path, local_files_only=True)


def num_tensors(config: LlamaConfig) -> int:
    """Returns how many tensors the cache needs: keys and values of each layer."""
    return 2 * config.num_hidden_layers


def block_shape(config: LlamaConfig, block_size: int = BLOCK_SIZE) -> list[int]:
    """Returns the shape of one block in one tensor: [block_size, kv_heads, head_dim]."""
    return [block_size, config.num_key_value_heads, config.head_dim]


def cache_shape(config: LlamaConfig, num_blocks: int, block_size: int = BLOCK_SIZE) -> list[int]:
    """Returns the shape of one cache tensor: [num_blocks, block_size, kv_heads, head_dim]."""
    return [num_blocks, *block_shape(config, block_size)]


def blocks_for(tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Returns how many blocks so many tokens need."""
    return -(-tokens // block_size)


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than the allocator has free."""


class BlockAllocator:
    """Hands out the block numbers of one cache, in the order it is given.

    Thread safety: none; one process, one thread.
    """

    def __init__(self, order: Iterable[int]) -> None:
        self._free = list(order)[::-1]

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Returns `count` blocks; on `OutOfBlocksError` nothing has changed."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Iterable[int]) -> None:
        """Makes blocks available again; the last one given back is the next one taken."""
        self._free.extend(blocks)


class BlockTable:
    """The blocks of one sequence, shared by all layers."""

    def __init__(self, allocator: BlockAllocator, block_size: int, device: torch.device) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._device = device
        self.set([])

    def set(self, blocks: Sequence[int]) -> None:
        """Says which blocks the sequence has, in the order of its tokens."""
        self.blocks = list(blocks)
        self.ids = torch.tensor(self.blocks, dtype=torch.int64, device=self._device)

    def reserve(self, length: int) -> None:
        """Takes as many blocks as `length` tokens need in all."""
        missing = blocks_for(length, self._block_size) - len(self.blocks)
        if missing > 0:
            self.set(self.blocks + self._allocator.take(missing))

    def slots(self, start: int, stop: int) -> torch.Tensor:
        """Returns where tokens [start, stop) live: block * block_size + offset, int64 [n]."""
        positions = torch.arange(start, stop, device=self._device)
        offsets = positions % self._block_size
        return self.ids[positions // self._block_size] * self._block_size + offsets

    def release(self) -> None:
        """Gives all blocks back."""
        self._allocator.give_back(self.blocks)
        self.set([])


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values, behind the interface that `transformers` calls."""

    def __init__(
        self, key_blocks: torch.Tensor, value_blocks: torch.Tensor, table: BlockTable, length: int
    ) -> None:
        super().__init__()
        self.key_blocks = key_blocks
        self.value_blocks = value_blocks
        self.table = table
        self.length = length  # tokens stored
        self.is_initialized = True  # the memory exists already

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the blocks were allocated with the cache."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new states, [1, kv_heads, n, head_dim], and returns all of them so far."""
        start, stop = self.length, self.length + key_states.shape[2]
        self.table.reserve(stop)
        slots = self.table.slots(start, stop)
        for blocks, states in ((self.key_blocks, key_states), (self.value_blocks, value_states)):
            blocks.flatten(0, 1).index_copy_(0, slots, states[0].transpose(0, 1))
        self.length = stop
        return self.gather()

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Collects the sequence's keys and values, each [1, kv_heads, length, head_dim]."""
        keys, values = (
            blocks.index_select(0, self.table.ids)
            .flatten(0, 1)[: self.length]
            .transpose(0, 1)
            .unsqueeze(0)
            for blocks in (self.key_blocks, self.value_blocks)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns (key length, offset) for the mask of a query of `query_length` tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """Returns -1: the block allocator is the only limit."""
        return -1


class PagedCache(Cache):
    """The KV cache of one sequence (batch 1) in the blocks of a larger cache.

    Args:
        tensors: the cache's tensors, keys and values of layer 0, 1, ... in turn.
        allocator: where blocks come from; this object gives them back in `release`.
        length: tokens whose keys and values will be put into the first blocks from outside, which
            is what a decode process does after it has pulled them.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], allocator: BlockAllocator, length: int = 0
    ) -> None:
        self.table = BlockTable(allocator, tensors[0].shape[1], tensors[0].device)
        self.table.reserve(length)
        pairs = zip(tensors[0::2], tensors[1::2], strict=True)
        super().__init__(layers=[PagedLayer(k, v, self.table, length) for k, v in pairs])

    @property
    def blocks(self) -> list[int]:
        """Block numbers of the sequence, in the order of its tokens."""
        return self.table.blocks

    def digest(self) -> str:
        """Returns a hash of the sequence's keys and values, wherever its blocks are.

        Attention doesn't mind in which order it sees keys and values, so equal tokens alone would
        not prove that every block is where it belongs; equal digests do.
        """
        digest = hashlib.sha256()
        for layer in self.layers:
            for states in layer.gather():
                digest.update(states.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def release(self) -> None:
        """Gives the sequence's blocks back; the object is of no use afterwards."""
        self.table.release()


@torch.inference_mode()
def prefill(model: LlamaForCausalLM, cache: PagedCache, prompt: Sequence[int]) -> int:
    """Reads the prompt into an empty cache and returns the first token after it."""
    tokens = torch.tensor([prompt], device=model.device)
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


@torch.inference_mode()
def decode(model: LlamaForCausalLM, cache: PagedCache, token: int, count: int) -> Iterator[int]:
    """Yields the `count` tokens after `token`, each the most probable one."""
    for _ in range(count):
        tokens = torch.tensor([[token]], device=model.device)
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        yield token


def generate(
    model: LlamaForCausalLM, cache: PagedCache, prompt: Sequence[int], count: int
) -> list[int]:
    """Does both in one process: the `count` tokens that follow the prompt."""
    first = prefill(model, cache, prompt)
    return [first, *decode(model, cache, first, count - 1)]

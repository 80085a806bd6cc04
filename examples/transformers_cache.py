# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face KV cache on the blocks of this library, handed over between processes.

`BlocksCache` is a `transformers` cache: `model.generate(ids, past_key_values=cache)` fills and uses
it. Its keys and values are blocks of an `llm_datadist_torch` cache, so another process can pull
them and go on generating where this one stopped. That is what this program does: one process reads
the prompts, another one writes the text, and the tokens must be those of `generate` alone. The exit
status is 1 if they are not.

    python examples/transformers_cache.py [--model DIRECTORY] [--tokens N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

import llm_datadist_torch as ld

EXAMPLES = Path(__file__).resolve().parent
BLOCK_SIZE = 16  # tokens
NUM_BLOCKS = 256
PROMPTS = 2  # of one length, as one batch
PROMPT_TOKENS = 200


# -- the cache: copy from here ---------------------------------------------------------------------


class BlocksLayer(CacheLayerMixin):
    """The keys and values of one layer, in blocks [num_blocks, block_size, heads, head_dim]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, cache: BlocksCache) -> None:
        super().__init__()
        self.key_blocks, self.value_blocks, self.cache = keys, values, cache
        self.length = 0  # tokens stored, of each sequence
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the blocks are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new states, [batch, heads, n, head_dim], and returns all of them so far."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.cache.reserve(self.length)
        slots = self.cache.slots(start, self.length)
        for blocks, states in ((self.key_blocks, key_states), (self.value_blocks, value_states)):
            blocks.flatten(0, 1)[slots] = states.transpose(1, 2)
        return self.gather(self.key_blocks), self.gather(self.value_blocks)

    def gather(self, blocks: torch.Tensor) -> torch.Tensor:
        """Returns the states of all sequences, [batch, heads, length, head_dim]."""
        return blocks[self.cache.table].flatten(1, 2)[:, : self.length].transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # as long as there are blocks


class BlocksCache(Cache):
    """The KV cache of a batch of sequences, in blocks of a larger cache that peers can reach.

    Args:
        kv: The larger cache: two tensors per layer, blocks of [block_size, heads, head_dim].
        free: Blocks that nobody uses; this takes from its end, and `release` gives them back.
        batch: Number of sequences.
    """

    def __init__(self, kv: ld.Cache, free: list[int], batch: int = 1) -> None:
        self.kv, self.free = kv, free
        self.block_size = kv.tensors[0].shape[1]
        self.table = torch.empty(batch, 0, dtype=torch.int64, device=kv.device)
        pairs = zip(kv.tensors[0::2], kv.tensors[1::2], strict=True)
        super().__init__(layers=[BlocksLayer(keys, values, self) for keys, values in pairs])

    @property
    def blocks(self) -> list[int]:
        """All blocks of all sequences; what a peer has to pull."""
        return self.table.flatten().tolist()

    def reserve(self, length: int) -> None:
        """Takes as many blocks as sequences of `length` tokens need."""
        batch, have = self.table.shape
        missing = -(-length // self.block_size) - have
        if missing > 0:
            if batch * missing > len(self.free):
                raise RuntimeError(f"{batch * missing} blocks needed, {len(self.free)} are free")
            taken = [self.free.pop() for _ in range(batch * missing)]
            more = torch.tensor(taken, device=self.table.device).view(batch, missing)
            self.table = torch.cat([self.table, more], dim=1)

    def slots(self, start: int, stop: int) -> torch.Tensor:
        """Returns where tokens [start, stop) are, [batch, n]: block * block_size + offset."""
        at = torch.arange(start, stop, device=self.table.device)
        return self.table[:, at // self.block_size] * self.block_size + at % self.block_size

    def pull(self, peer: ld.Peer, blocks: Sequence[int], length: int) -> None:
        """Takes over what a peer has computed: `length` tokens of each sequence, in its blocks."""
        self.reserve(length)
        peer.pull("kv", self.kv, blocks, self.blocks)
        for layer in self.layers:
            layer.length = length

    def release(self) -> None:
        """Gives all blocks back; the object is of no use afterwards."""
        self.free += self.blocks
        self.table = self.table[:, :0]


# -- two processes that use it ---------------------------------------------------------------------


def load(model: Path) -> PreTrainedModel:
    torch.set_num_threads(1)  # the two processes share the machine; and sums keep their order
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)


def allocate(node: ld.Node, model: PreTrainedModel) -> ld.Cache:
    config = model.config
    shape = (BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    layers = config.num_hidden_layers
    kv = node.allocate(layers=layers, blocks=NUM_BLOCKS, shape=shape, dtype=model.dtype, name="kv")
    model.to(kv.device)
    return kv


def generate(model: PreTrainedModel, ids: torch.Tensor, **more: object) -> torch.Tensor:
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, **more).cpu()


def prefill(pipe: Connection, model_path: Path, prompts: torch.Tensor) -> None:
    """Reads the prompts, says where their keys and values are, and keeps them until told."""
    model = load(model_path)
    with ld.open(listen="127.0.0.1:0") as node:
        cache = BlocksCache(allocate(node, model), list(range(NUM_BLOCKS)), len(prompts))
        # The first new token is chosen here; its own keys and values are not computed yet.
        ids = generate(model, prompts, past_key_values=cache, max_new_tokens=1)
        length = cache.get_seq_length()
        pipe.send((node.address, ids.tolist(), cache.blocks, length))
        pipe.recv()
        cache.release()


def decode(pipe: Connection, model_path: Path, count: int) -> None:
    """Pulls the keys and values into other blocks, and writes the rest of the text."""
    model = load(model_path)
    with ld.open() as node:
        kv = allocate(node, model)
        address, ids, blocks, length = pipe.recv()
        cache = BlocksCache(kv, list(range(NUM_BLOCKS // 2)), len(ids))
        cache.pull(node.connect(address), blocks, length)
        pairs = list(zip(blocks, cache.blocks, strict=True))
        print(f"{length} tokens of {len(ids)} sequences pulled: blocks {pairs[:6]} ...", flush=True)
        pipe.send("pulled")
        tokens = torch.tensor(ids)
        pipe.send(generate(model, tokens, past_key_values=cache, max_new_tokens=count - 1).tolist())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model", help="a directory")
    parser.add_argument("--tokens", type=int, default=64, help="new ones (%(default)s)")
    args = parser.parse_args(argv)
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: one on each side")
    text = (EXAMPLES / "prompt.txt").read_bytes()
    prompts = torch.tensor([list(text[37 * n :][:PROMPT_TOKENS]) for n in range(PROMPTS)])
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for target, last in ((prefill, prompts), (decode, args.tokens)):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, args.model, last), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    one, two = pipes
    try:
        two.send(one.recv())
        one.send(two.recv())
        result = torch.tensor(two.recv())
    except EOFError:
        print("a process has failed", file=sys.stderr)
        return 1
    for process in processes:
        process.join()
    expected = generate(load(args.model), prompts, max_new_tokens=args.tokens)
    for row in result:
        print(repr(bytes(row[PROMPT_TOKENS:].tolist())))
    equal = torch.equal(result, expected)
    print("tokens equal to those of generate() alone" if equal else "TOKENS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

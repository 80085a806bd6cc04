# SPDX-License-Identifier: Apache-2.0
"""A small inference engine whose memory is `llm_datadist_torch`: a loop to copy from.

- Continuous batching: each step gives every running sequence one token; sequences join and leave
  in between. The forward passes of a step run one by one with batch 1, for clarity.
- Prefix reuse: prompts that begin alike share full blocks, found by a hash of their tokens.
- Forks: continuations of one prompt share its blocks. Who writes into a shared block gets a copy of
  it first: `copy_blocks`.
- Preemption: when the blocks run out, the youngest sequence moves to a host cache, and later back
  into whatever blocks are free then: `swap_blocks`.

At the end every output must equal what `model.generate` makes of the same prompt alone; the exit
status is 1 if one does not. Without an NPU, "device" memory is ordinary memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import paged_model as pm
import torch
from shared_blocks import BlockPool, block_hashes, place

import llm_datadist_torch as ld

TEXT = (Path(__file__).resolve().parent / "prompt.txt").read_bytes()


@dataclass(eq=False)
class Request:
    """A prompt, and how many continuations of it are wanted."""

    number: int
    prompt: list[int]
    forks: int
    arrival: int  # step
    outputs: dict[int, list[int]] = field(default_factory=dict)  # fork -> tokens


@dataclass(eq=False)
class Running:
    """One sequence: a fork of a request, its tokens, and where its keys and values are."""

    request: Request
    fork: int
    tokens: list[int]
    kv: pm.PagedCache  # keeps the numbers of the device blocks that it has left, too
    host_blocks: list[int] = field(default_factory=list)  # while it is swapped out

    @property
    def age(self) -> tuple[int, int]:
        return self.request.number, self.fork

    def __str__(self) -> str:
        return f"{self.request.number}.{self.fork}"


class Engine:
    """Scheduler, memory and model: `tokens` for each sequence, `limit` of them at a time."""

    def __init__(self, model: pm.LlamaForCausalLM, blocks: int, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        self.node = ld.open()
        layers, shape = model.config.num_hidden_layers, pm.block_shape(model.config)
        self.pool, self.host_pool = BlockPool(blocks), pm.BlockAllocator(range(blocks * limit))
        self.device = self.node.allocate(layers=layers, blocks=blocks, shape=shape)
        self.host = self.node.allocate(
            layers=layers, blocks=blocks * limit, shape=shape, placement="host"
        )
        self.model = model.to(self.device.device)
        self.waiting: deque[Request] = deque()
        self.running: list[Running] = []  # oldest first
        self.swapped: list[Running] = []  # oldest first
        self.counts: Counter[str] = Counter()
        self.plan_nothing()

    def say(self, text: str) -> None:
        print(f"step {self.counts['steps']:3}  {text}", flush=True)

    def run(self, requests: list[Request]) -> None:
        """Serves all requests; their outputs are in them afterwards."""
        for request in requests:  # one that runs alone must get to its end
            needed = pm.blocks_for(len(request.prompt) + self.tokens) + request.forks
            if needed > self.pool.num_free or request.forks > self.limit:
                text = f"request {request.number}: {needed} blocks, {request.forks} running needed"
                raise pm.OutOfBlocksError(f"{text}, {self.pool.num_free} and {self.limit} allowed")
        coming = deque(sorted(requests, key=lambda request: request.arrival))
        while coming or self.waiting or self.running or self.swapped:
            while coming and coming[0].arrival <= self.counts["steps"]:
                self.waiting.append(coming.popleft())
            self.schedule()
            self.move()
            for sequence in list(self.running):
                self.forward(sequence)
            self.counts["steps"] += 1

    # -- the scheduler: what runs in this step, and which blocks move before it -------------------

    def plan_nothing(self) -> None:
        self.swap_out: list[tuple[int, int]] = []  # device block, host block
        self.swap_in: list[tuple[int, int]] = []  # host block, device block
        self.copies: dict[int, list[int]] = {}  # source block, its copies

    def schedule(self) -> None:
        """The oldest get their blocks first; what is left is for those who are not running."""
        for sequence in list(self.running):
            if sequence in self.running:  # or else an older one has just preempted it
                self.make_room(sequence)
        if not self.swap_out:  # never in while others go out
            while self.swapped and self.has_room(len(self.swapped[0].host_blocks), 1):
                self.resume(self.swapped.pop(0))
            if self.waiting and not self.swapped:
                self.start(self.waiting[0])  # one prompt per step: running ones are not held up

    def make_room(self, sequence: Running) -> None:
        """Sees to the block that the next token goes to, if need be at the youngest's expense."""
        blocks, length = sequence.kv.blocks, sequence.kv.get_seq_length()
        last, is_full = blocks[-1], length == len(blocks) * pm.BLOCK_SIZE
        while is_full or self.pool.references[last] > 1:
            if not self.pool.num_free:
                victim = self.running[-1]
                self.preempt(victim)
                if victim is sequence:
                    return
                continue
            if is_full:
                sequence.kv.table.reserve(length + 1)
                return
            (copy,) = self.pool.take(1)  # copy on write
            self.pool.give_back([last])
            place(sequence.kv, [*blocks[:-1], copy], length)
            self.copies.setdefault(last, []).append(copy)
            self.counts["blocks copied on write"] += 1
            self.say(f"{sequence} writes into block {last}, which is shared: copied to {copy}")
            return

    def has_room(self, blocks: int, sequences: int) -> bool:
        """Whether all can run on for at least a block when these come in."""
        total = len(self.running) + sequences
        return total <= self.limit and blocks + total <= self.pool.num_free

    def preempt(self, victim: Running) -> None:
        """Plans to swap a sequence out; blocks that it shares stay with the others as well."""
        blocks = victim.kv.blocks
        victim.host_blocks = self.host_pool.take(len(blocks))
        self.swap_out += zip(blocks, victim.host_blocks, strict=True)
        self.pool.give_back(blocks)
        self.running.remove(victim)
        self.swapped.insert(0, victim)  # older than those who went before it
        self.counts["preemptions"] += 1
        self.counts["blocks swapped out"] += len(blocks)
        self.say(f"{victim} swapped out: blocks {blocks} to host blocks {victim.host_blocks}")

    def resume(self, sequence: Running) -> None:
        """Plans to swap a sequence in, to blocks of its own."""
        left, from_host = sequence.kv.blocks, sequence.host_blocks
        blocks = self.pool.take(len(from_host))
        self.swap_in += zip(from_host, blocks, strict=True)
        self.host_pool.give_back(from_host)  # read before anything is written there
        place(sequence.kv, blocks, sequence.kv.get_seq_length())
        self.enter(sequence)
        self.counts["blocks swapped in"] += len(blocks)
        moved = sum(old != new for old, new in zip(left, blocks, strict=True))
        self.counts["blocks swapped in elsewhere"] += moved
        self.say(f"{sequence} swapped in: host blocks {from_host} to blocks {blocks}")

    def start(self, request: Request) -> None:
        """Starts a request if its prompt fits, beginning with blocks that others have computed."""
        prompt = request.prompt
        shared = self.pool.find(block_hashes(prompt[:-1]))  # the last token gives us logits
        new = pm.blocks_for(len(prompt)) - sum(self.pool.references[b] > 0 for b in shared)
        if not self.has_room(new, request.forks):
            return
        self.waiting.popleft()
        self.pool.share(shared)
        kv = pm.PagedCache(self.device.tensors, self.pool)
        place(kv, shared, len(shared) * pm.BLOCK_SIZE)
        kv.table.reserve(len(prompt))
        self.enter(Running(request, 0, list(prompt), kv))
        self.counts["prefix blocks shared"] += len(shared)
        text = f"{len(prompt)} tokens, {len(shared)} blocks known: {kv.blocks}"
        self.say(f"{self.running[-1]} starts: {text}")

    def enter(self, sequence: Running) -> None:
        self.running.append(sequence)
        self.running.sort(key=lambda running: running.age)
        self.counts["most running"] = max(self.counts["most running"], len(self.running))

    # -- the memory: at most three calls per step, whatever was scheduled -------------------------

    def move(self) -> None:
        """Carries out the plan. What goes out is read before its blocks are written again."""
        if self.swap_out:
            self.node.swap_blocks(self.device, self.host, torch.tensor(self.swap_out))
        if self.swap_in:
            self.node.swap_blocks(self.host, self.device, torch.tensor(self.swap_in))
        if self.copies:
            self.node.copy_blocks(self.device, self.copies)
        self.plan_nothing()

    @torch.inference_mode()
    def forward(self, sequence: Running) -> None:
        """Computes the tokens whose keys and values are missing, and chooses the next one."""
        kv, request, tokens = sequence.kv, sequence.request, sequence.tokens
        missing = torch.tensor([tokens[kv.get_seq_length() :]], device=self.model.device)
        logits = self.model(missing, past_key_values=kv, logits_to_keep=1).logits[0, -1]
        for digest, block in zip(block_hashes(tokens), kv.blocks, strict=False):
            self.pool.publish(digest, block)
        if len(tokens) == len(request.prompt):
            self.fork(sequence, logits.topk(request.forks).indices.tolist())
        else:
            tokens.append(int(logits.argmax()))
        output = tokens[len(request.prompt) :]
        if len(output) == self.tokens:
            request.outputs[sequence.fork] = output
            self.running.remove(sequence)
            kv.release()
            self.say(f"{sequence} is done")

    def fork(self, parent: Running, first_tokens: list[int]) -> None:
        """Starts one continuation with each token; all of them share the prompt's blocks."""
        for number, token in enumerate(first_tokens[1:], start=1):
            kv = pm.PagedCache(self.device.tensors, self.pool)
            place(kv, parent.kv.blocks, parent.kv.get_seq_length())
            self.pool.share(kv.blocks)
            child = Running(parent.request, number, [*parent.tokens, token], kv)
            self.enter(child)
            self.counts["forks"] += 1
            self.say(f"{child} forks from {parent}: shares {len(kv.blocks)} blocks")
        parent.tokens.append(first_tokens[0])


def make_requests(count: int) -> list[Request]:
    """Prompts that begin alike, as with a system prompt; every third one is to be forked."""
    prompts = (list(TEXT[:168] + TEXT[168 + 37 * n :][: 20 + 9 * n % 64]) for n in range(count))
    return [Request(n, prompt, 3 if n % 3 == 1 else 1, 3 * n) for n, prompt in enumerate(prompts)]


@torch.inference_mode()
def plain(model: pm.LlamaForCausalLM, request: Request, count: int) -> dict[int, list[int]]:
    """The outputs without this library: one sequence at a time, the cache of `transformers`."""
    size, outputs = len(request.prompt), {}
    best = model(torch.tensor([request.prompt])).logits[0, -1].topk(request.forks).indices
    for fork, first in enumerate(best.tolist()):
        ids = torch.tensor([[*request.prompt, first]])
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, do_sample=False, max_length=size + count)
        outputs[fork] = text[0, size:].tolist()
    return outputs


def main(argv: list[str] | None = None) -> int:
    about, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=36, help="device blocks (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="per sequence (%(default)s)")
    parser.add_argument("--requests", type=int, default=7, help="how many (%(default)s)")
    parser.add_argument("--running", type=int, default=6, help="at a time, at most (%(default)s)")
    args = parser.parse_args(argv)
    if min(vars(args).values()) < 2 or args.tokens > 512:
        parser.error("each number must be at least 2, and --tokens 512 at most")
    model, requests = pm.load_model(), make_requests(args.requests)
    engine = Engine(model, args.blocks, args.tokens, args.running)
    began = time.monotonic()
    with engine.node:  # closes it
        try:
            engine.run(requests)
        except pm.OutOfBlocksError as error:
            parser.error(str(error))
    seconds, equal = time.monotonic() - began, list[bool]()
    model.cpu()  # there the comparison is made, wherever the engine was
    for request in requests:
        for fork, expected in plain(model, request, args.tokens).items():
            equal.append(request.outputs[fork] == expected)
            verdict = "equal" if equal[-1] else "DIFFERENT"
            print(f"{request.number}.{fork}  {verdict}  {bytes(request.outputs[fork][:64])!r}")
    engine.counts["blocks still held"] = args.blocks - engine.pool.num_free
    for name, count in sorted(engine.counts.items()):
        print(f"{name:28}{count:6}")
    print(f"{len(equal) * args.tokens / seconds:.0f} tokens/s")
    print(f"outputs equal to plain generation's: {sum(equal)} of {len(equal)}")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())

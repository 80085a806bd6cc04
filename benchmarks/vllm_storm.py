# SPDX-License-Identifier: Apache-2.0
"""The connector's workers with "pull" in a storm: every byte that is loaded is compared.

Producers are processes of their own; without vLLM, which would spend the time on computing. Prompts
arrive, and are loaded at once, late, after they were queued, or never. Producers are frozen, or
killed and started anew under the same id and port, with other KV and at times with another model.
What ends is overwritten at once, so a load that succeeds too late has wrong bytes.

    python -m benchmarks.vllm_storm --seconds 1800

It fails if a load that succeeded has wrong bytes, if one never ends, or if a block is not free in
the end."""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from benchmarks import common
from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.steps import Pull, Renewal, Step
from tests.vllm_parts.workers import BLOCK, FINGERPRINT, Worker

MODEL, OTHER_MODEL = "w", "v"
PRODUCER_BLOCKS, CONSUMER_BLOCKS, MOST_BLOCKS = 64, 128, 8
CLAIM_S, LEASE_S, TIMEOUT_S = 1.0, 2.0, 3.0
END_S = 60.0


def pattern(seed: int, number: int, shape: torch.Size) -> torch.Tensor:
    """What is in a layer's blocks under a lease; each layer differs by what is added to it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randn(shape, generator=generator)


def fill(worker: Worker, blocks: list[int], seed: int, number: int) -> None:
    for at, tensor in enumerate(worker.kv.values()):
        tensor[blocks] = pattern(seed, number, tensor[blocks].shape) + at


def is_right(worker: Worker, blocks: list[int], seed: int, number: int) -> bool:
    return all(
        torch.equal(tensor[blocks], pattern(seed, number, tensor[blocks].shape) + at)
        for at, tensor in enumerate(worker.kv.values())
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -- a producer ------------------------------------------------------------------------------------


def produce(pipe: Connection, seed: int, endpoint: tuple[int, int], model: str) -> None:
    """An engine of one worker: it keeps blocks when it is told to, and reuses what it need not."""
    torch.set_num_threads(1)
    worker = Worker(
        PRODUCER_BLOCKS,
        seed,
        msgspec.structs.replace(FINGERPRINT, weights=model),
        cluster_id=endpoint[0],
        port=endpoint[1],
        claim_s=CLAIM_S,
        lease_s=LEASE_S,
    )
    free, kept = list(range(1, PRODUCER_BLOCKS)), dict[str, list[int]]()
    pipe.send("ready")
    number = 0
    with suppress(EOFError, BrokenPipeError):
        while True:
            if pipe.poll(0.005):
                count = pipe.recv()
                if count == 0:
                    pipe.send(len(free))
                elif count > len(free):
                    pipe.send(None)
                else:
                    number += 1
                    blocks, free = free[:count], free[count:]
                    kept[f"p{number}"] = blocks
                    fill(worker, blocks, seed, number)
                    remote = worker.grant(blocks, count * BLOCK, number)
                    pipe.send(msgspec.structs.replace(remote, remote_lease_s=LEASE_S).to_params())
            for name in worker.half.take_done().sent:
                blocks = kept.pop(name)
                for tensor in worker.kv.values():
                    tensor[blocks] = -1
                free += blocks
    worker.half.close()


class Producer:
    """One that is started, frozen and killed from outside."""

    def __init__(self, cluster_id: int) -> None:
        self._endpoint = cluster_id, free_port()
        self._context = multiprocessing.get_context("spawn")
        self.seed = 0
        self.frozen_until = 0.0
        self.start(MODEL)

    def start(self, model: str) -> None:
        self.seed = random.randrange(1, 1 << 30)
        self.model = model
        self._pipe, theirs = self._context.Pipe()
        arguments = theirs, self.seed, self._endpoint, model
        self._process = self._context.Process(target=produce, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def request(self, count: int) -> Any:  # noqa: ANN401  what came through a pipe
        """Keep so many blocks; 0: how many are free."""
        self._pipe.send(count)
        return self._pipe.recv()

    @property
    def answers(self) -> bool:
        """Whether it has started, and is not frozen."""
        if not self._ready and self._pipe.poll():
            self._ready = self._pipe.recv() == "ready"
        return self._ready and not self.is_frozen

    @property
    def is_frozen(self) -> bool:
        return self.frozen_until > 0

    def freeze(self, seconds: float) -> None:
        self.frozen_until = time.monotonic() + seconds
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.frozen_until = 0.0
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()
        self.frozen_until = 0.0

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


# -- the consumer ----------------------------------------------------------------------------------


@dataclass
class Load:
    """A prompt on its way to the consumer."""

    remote: RemoteBlocks
    seed: int
    model: str
    begins_at: float
    blocks: list[int] = field(default_factory=list)


class Storm:
    """One consumer, several producers."""

    def __init__(self, num_producers: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._consumer = Worker(CONSUMER_BLOCKS, 0, verify=True, timeout_s=TIMEOUT_S)
        self._producers = [Producer(100 + at) for at in range(num_producers)]
        self._free = list(range(1, CONSUMER_BLOCKS))
        self._waiting: dict[str, Load] = {}
        self._loading: dict[str, Load] = {}

    def run(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        kinds = {self._arrive: 500.0, self._freeze: 3.0, self._kill: 1.0}
        while time.monotonic() < ends_at:
            random.choices(list(kinds), list(kinds.values()))[0]()
            self._advance()
            time.sleep(0.005)
        self._finish()

    def _arrive(self) -> None:
        producer = random.choice(self._producers)
        count = random.randrange(1, MOST_BLOCKS + 1)
        params = producer.request(count) if producer.answers else None
        if params is None:
            return
        fates = {"now": 50, "late": 15, "queued": 15, "released": 10, "never": 10}
        (fate,) = random.choices(list(fates), list(fates.values()))
        self.counts[fate] += 1
        name = f"d{sum(self.counts.values())}"
        wait_s = 0.0 if fate == "now" else random.uniform(0, 2.5 * CLAIM_S)
        remote = RemoteBlocks.of(params)
        load = Load(remote, producer.seed, producer.model, time.monotonic() + wait_s)
        if fate == "queued":
            self._consumer.half.step(Step(renewals=[Renewal(name, remote)]))
        if fate == "released":
            self._consumer.half.step(Step(pulls=[Pull(name, remote, awaited=False)]))
        elif fate != "never":
            self._waiting[name] = load

    def _freeze(self) -> None:
        producer = random.choice(self._producers)
        if producer.answers:
            self.counts["frozen"] += 1
            producer.freeze(random.uniform(0.1, 1.5 * TIMEOUT_S))

    def _kill(self) -> None:
        producer = random.choice(self._producers)
        if not producer.answers and not producer.is_frozen:
            return
        self.counts["killed"] += 1
        producer.kill()
        producer.start(random.choices([MODEL, OTHER_MODEL], [3, 1])[0])

    def _advance(self) -> None:
        now = time.monotonic()
        for producer in self._producers:
            if producer.is_frozen and producer.frozen_until < now:
                producer.wake()
        self.counts["lost while queued"] += len(self._consumer.half.take_lost())
        for name, load in list(self._waiting.items()):
            count = len(load.remote.remote_block_ids[0])
            if load.begins_at <= now and count <= len(self._free):
                del self._waiting[name]
                load.blocks, self._free = self._free[:count], self._free[count:]
                self._loading[name] = load
                pull = Pull(name, load.remote, (tuple(load.blocks),), 0, count * BLOCK)
                self._consumer.half.step(Step(pulls=[pull]))
        done = self._consumer.half.take_done()
        for name in done.received:
            self._end(self._loading.pop(name), failed=name in done.failed)

    def _end(self, load: Load, *, failed: bool) -> None:
        if failed:
            self.counts["failed"] += 1
        elif load.model == MODEL and is_right(
            self._consumer, load.blocks, load.seed, load.remote.remote_lease
        ):
            self.counts["right"] += 1
        else:
            self.counts["WRONG"] += 1
        self._free += load.blocks

    def _finish(self) -> None:
        """Nothing new; all that was begun ends."""
        ends_at = time.monotonic() + END_S
        while time.monotonic() < ends_at:
            self._advance()
            answered = [producer.request(0) for producer in self._producers if producer.answers]
            if (
                not self._waiting
                and not self._loading
                and answered == [PRODUCER_BLOCKS - 1] * len(self._producers)
            ):
                break
            time.sleep(0.02)
        else:
            self.counts["NEVER ENDED"] = len(self._waiting) + len(self._loading)
            self.counts["PRODUCERS WITH BLOCKS THAT ARE NOT FREE"] = sum(
                not producer.answers or producer.request(0) != PRODUCER_BLOCKS - 1
                for producer in self._producers
            )
        if len(self._free) != CONSUMER_BLOCKS - 1:
            self.counts["BLOCKS THAT ARE NOT FREE"] = CONSUMER_BLOCKS - 1 - len(self._free)

    def close(self) -> None:
        for producer in self._producers:
            producer.close()
        self._consumer.half.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--producers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="else another each time")
    args = parser.parse_args()
    common.print_environment()
    seed = random.randrange(1 << 30) if args.seed is None else args.seed
    random.seed(seed)
    print(f"seed {seed}")
    storm = Storm(args.producers)
    storm.run(args.seconds)
    storm.close()
    for name, count in storm.counts.items():
        print(f"{name}: {count}")
    if any(name.isupper() for name in storm.counts) or not storm.counts["right"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

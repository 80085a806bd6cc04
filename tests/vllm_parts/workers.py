# SPDX-License-Identifier: Apache-2.0
"""Workers of the connector with tensors of vLLM's kind, without vLLM."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import GroupLayout, GroupSpec, Kind, LayerTensors, describe
from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Grant, Pull, Step
from llm_datadist_torch.vllm.worker.half import WorkerHalf
from llm_datadist_torch.vllm.worker.pulling import Done
from tests.service import eventually

FINGERPRINT = Fingerprint(
    vllm="1",
    platform="p",
    weights="w",
    config="c",
    dtype="float32",
    kv_dtype="float32",
    kernel="k",
)
LAYERS, HEADS, BLOCK = 3, 2, 32


def group(
    *layers: str,
    kind: Kind = Kind.ATTENTION,
    block: int = BLOCK,
    heads: int = HEADS,
    window: int = 0,
) -> GroupSpec:
    """One KV cache group."""
    return GroupSpec(GroupLayout(kind, block, window), layers, dict.fromkeys(layers, heads))


class Worker:
    """A worker with KV that all differs.

    Args:
        num_blocks: Blocks of its engine.
        seed: Of the numbers in its KV.
        fingerprint: What it says of itself.
        rank: Its tensor-parallel rank.
        ranks: How many of those there are.
        block: Tokens of a block.
        kv: Its KV, by layer; None: a model of vLLM's CPU backend.
        groups: Its KV cache groups; None: one of all layers.
        settings: The connector's.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        fingerprint: Fingerprint = FINGERPRINT,
        rank: int = 0,
        ranks: int = 1,
        block: int = BLOCK,
        kv: dict[str, LayerTensors] | None = None,
        groups: list[GroupSpec] | None = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(seed)
        storage = torch.randn(LAYERS, num_blocks, HEADS // ranks, block, 16)
        self.kv: Any = kv or dict(zip("abc", storage, strict=True))
        layout, caches = describe(
            self.kv,
            groups or [group(*self.kv, block=block)],
            arrangement="cpu/vec",
            num_blocks=num_blocks,
            tp_rank=rank,
            tp_size=ranks,
        )
        self.layout = layout
        given = Settings.of({"timeout_s": 20.0, "claim_s": 60.0} | settings)
        self.half = WorkerHalf(given, fingerprint, layout, caches)
        self._numbers = itertools.count(1)

    def grant(self, blocks: list[int], num_tokens: int, number: int | None = None) -> RemoteBlocks:
        """Keep blocks of the only group, and say so."""
        return self.grant_groups((tuple(blocks),), num_tokens, number)

    def grant_groups(
        self, blocks: tuple[tuple[int, ...], ...], num_tokens: int, number: int | None = None
    ) -> RemoteBlocks:
        """Keep blocks, and say so."""
        number = next(self._numbers) if number is None else number
        remote = self.remote(blocks, num_tokens, number)
        self.half.step(Step(grants=[Grant(number, f"p{number}", blocks)]))
        return remote

    def remote(
        self, blocks: tuple[tuple[int, ...], ...], num_tokens: int, number: int
    ) -> RemoteBlocks:
        """What the client is told of a lease."""
        return RemoteBlocks(
            remote_engine_id="engine",
            remote_request_id=f"p{number}",
            remote_lease=number,
            remote_lease_s=120.0,
            remote_peers=(self.half.address,),
            remote_tp_size=1,
            remote_block_ids=blocks,
            remote_num_tokens=num_tokens,
            prompt="",
        )

    def start(
        self, remote: RemoteBlocks, blocks: list[int], first: int, tokens: int, name: str = "d"
    ) -> None:
        """Begin a pull."""
        self.half.step(Step(pulls=[Pull(name, remote, (tuple(blocks),), first, tokens)]))

    def pull(self, remote: RemoteBlocks, blocks: list[int], first: int, tokens: int) -> set[int]:
        """Pull and wait; the blocks that failed."""
        self.start(remote, blocks, first, tokens)
        return self.wait()

    def wait(self) -> set[int]:
        """The blocks of the request "d" that failed, once it is done."""
        done, _ = self.collect({"d"})
        assert done.received == {"d"}
        return set().union(*done.failed.values())

    def collect(self, names: set[str], seconds: float = 15.0) -> tuple[Done, dict[str, float]]:
        """What is done until all of these have been received, and when each was."""
        found = Done()
        times: dict[str, float] = {}
        end = time.monotonic() + seconds
        while not names <= found.received and time.monotonic() < end:
            done = self.half.take_done()
            for name in done.received:
                times[name] = time.monotonic()
            found.add(done)
            time.sleep(0.005)
        return found, times

    def freed(self, name: str) -> bool:
        """Whether the blocks of a request need not be kept any more, sooner or later."""
        return eventually(lambda: name in self.half.take_done().sent)


def snapshot(worker: Worker) -> dict[str, torch.Tensor]:
    """A copy of a worker's KV."""
    return {name: tensor.clone() for name, tensor in worker.kv.items()}

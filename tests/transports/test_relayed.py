# SPDX-License-Identifier: Apache-2.0
"""How many pieces of a relayed movement are under way, and what becomes of them when one fails."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from llm_datadist_torch.transports.base import Direction, Movement
from llm_datadist_torch.transports.local import relayed
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

BLOCKS, BLOCK = 6, 64


class FakeRequest:
    def __init__(self, relay: FakeRelay, spans: torch.Tensor, data: memoryview | None) -> None:
        self.relay, self.spans, self.data = relay, spans, data
        relay.under_way.add(self)
        relay.most = max(relay.most, len(relay.under_way))

    def wait(self) -> bytes:
        self.close()
        self.relay.waited += 1
        if self.relay.waited == self.relay.refused:
            raise error_for(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, "it has ended")
        parts = []
        at = 0
        for address, nbytes in self.spans.tolist():
            if self.data is None:
                parts.append(ctypes.string_at(address, nbytes))
            else:
                ctypes.memmove(address, bytes(self.data[at : at + nbytes]), nbytes)
                at += nbytes
        return b"".join(parts)

    def close(self) -> None:
        self.relay.under_way.discard(self)


class FakeRelay:
    """The peer's memory is this process's."""

    def __init__(self, refused: int = 0) -> None:
        self.refused = refused
        self.waited = self.most = 0
        self.under_way: set[FakeRequest] = set()

    def read(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> FakeRequest:
        return FakeRequest(self, spans, None)

    def write(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> FakeRequest:
        return FakeRequest(self, spans, data)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    theirs = torch.arange(BLOCKS * BLOCK, dtype=torch.int64).remainder(251).to(torch.uint8)
    return {"mine": torch.zeros(BLOCKS * BLOCK, dtype=torch.uint8), "theirs": theirs}


def movement(tensors: dict[str, torch.Tensor], direction: Direction) -> Any:
    starts = torch.arange(BLOCKS) * BLOCK
    runs = torch.stack([starts.flip(0), starts, torch.full((BLOCKS,), BLOCK)], dim=1)
    addrs = {name: torch.tensor([tensor.data_ptr()]) for name, tensor in tensors.items()}
    return Movement(direction, addrs["mine"], addrs["theirs"], runs.contiguous(), None, 1)


@pytest.fixture(autouse=True)
def pieces_of_a_block_and_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed, "RELAY_CHUNK", BLOCK * 3 // 2)


@pytest.mark.parametrize("direction", list(Direction))
def test_two_pieces_are_under_way(tensors: dict[str, torch.Tensor], direction: Direction) -> None:
    relay = FakeRelay()
    if direction is Direction.WRITE:
        tensors["mine"], tensors["theirs"] = tensors["theirs"], tensors["mine"]
    relayed.Relayed(relay).move(movement(tensors, direction), Deadline.after_ms(10_000))
    assert torch.equal(
        tensors["mine"].view(BLOCKS, BLOCK), tensors["theirs"].view(BLOCKS, BLOCK).flip(0)
    )
    assert tensors["mine"].any()
    assert relay.waited == 4
    assert relay.most == 2
    assert not relay.under_way


def test_a_refusal_ends_what_is_under_way(tensors: dict[str, torch.Tensor]) -> None:
    relay = FakeRelay(refused=2)
    with pytest.raises(LLMException, match="it has ended"):
        relayed.Relayed(relay).move(movement(tensors, Direction.READ), Deadline.after_ms(10_000))
    assert relay.waited == 2
    assert not relay.under_way
    # The piece that came before is there, and nothing of those that came after.
    assert tensors["mine"][-BLOCK:].any()
    assert not tensors["mine"][: 3 * BLOCK].any()

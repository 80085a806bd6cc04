# SPDX-License-Identifier: Apache-2.0
"""A channel of the `hixl` transport over an engine that follows a script."""

from __future__ import annotations

import torch

from llm_datadist_torch.transports.base import Direction, MemorySpan, Movement
from llm_datadist_torch.transports.hixl import messages
from llm_datadist_torch.transports.hixl.channel import HixlChannel
from llm_datadist_torch.transports.hixl.connection import Connection
from llm_datadist_torch.transports.hixl.ranges import RegisteredRange
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.values.deadline import Deadline
from tests.peers import eventually
from tests.transports.fake_hixl import FakeEngine, TransferStatus

REMOTE = "10.0.0.2:26000"
BASE, SIZE = 1 << 30, 1 << 20
META = torch.device("meta")
PARAM_INVALID, TIMEOUT, NOT_CONNECTED, ALREADY_CONNECTED = 103900, 103901, 103902, 103903
FAILED, RESOURCE_EXHAUSTED = 503900, 203900
WAITING, COMPLETED = (0, TransferStatus.WAITING), (0, TransferStatus.COMPLETED)


class Rig:
    """A channel over a scripted engine that has [BASE, BASE + SIZE) registered."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.script = self.engine.script
        self.memory = Registrations(self.engine, lambda: self.memory.deregister_unused())  # type: ignore[arg-type]
        self.memory.add(MemorySpan(BASE, SIZE, META))
        self.connection = Connection(self.engine, REMOTE, self.memory)  # type: ignore[arg-type]
        self.said: list[messages.Message] = []
        self.their_ranges = [RegisteredRange(1 << 40, SIZE, 1)]
        self.channel = self.new_channel()
        self.script.calls.clear()

    def new_channel(self) -> HixlChannel:
        """To a peer that says what it has registered as soon as it is asked."""
        return HixlChannel(self.engine, self.memory, self.connection, self)  # type: ignore[arg-type]

    def post(self, transport: str, payload: bytes) -> None:
        """As the control connection does, to the peer's channel."""
        assert transport == "hixl"
        message = messages.decode(payload)
        self.said.append(message)
        if isinstance(message, messages.Query):
            self.advertise(*self.their_ranges)

    def advertise(self, *ranges: RegisteredRange, whole: bool = True) -> None:
        """The peer tells what it has registered."""
        latest = max((one.generation for one in ranges), default=0)
        self.connection.told(messages.Registered(latest, list(ranges), whole))

    def move(self, movement=None, ms=5000):
        return self.channel.move(movement or moved(), Deadline.after_ms(ms))

    def count(self, name):
        return self.script.names().count(name)

    def reconnected(self):
        """Whether the connection was broken, and made anew in the background."""
        return self.count("disconnect") == 1 and eventually(lambda: self.count("connect") == 2)


def moved(
    runs=((0, 0, 64),),
    tensors=2,
    direction=Direction.READ,
    region=None,
    local=BASE,
    remote=1 << 40,
):
    step = 4096
    return Movement(
        direction,
        torch.arange(tensors) * step + local,
        torch.arange(tensors) * step + remote,
        torch.tensor(runs),
        region,
        1,
        local_device=META,
        remote_device="npu:0",
    )

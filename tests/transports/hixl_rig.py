# SPDX-License-Identifier: Apache-2.0
"""A channel of the `hixl` transport over an engine that follows a script."""

from __future__ import annotations

import torch

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import Direction, MemorySpan, Movement
from llm_datadist_torch.transports.hixl.channel import HixlChannel
from llm_datadist_torch.transports.hixl.connection import Connection
from llm_datadist_torch.transports.hixl.registrations import Registrations
from tests.peers import settle
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
        self.memory = Registrations(self.engine)  # type: ignore[arg-type]
        self.memory.add(MemorySpan(BASE, SIZE, META))
        self.connection = Connection(self.engine, REMOTE)  # type: ignore[arg-type]
        self.channel = HixlChannel(self.engine, self.memory, self.connection)  # type: ignore[arg-type]
        self.script.calls.clear()

    def move(self, movement=None, ms=5000):
        return self.channel.move(movement or moved(), Deadline.after_ms(ms))

    def count(self, name):
        return self.script.names().count(name)

    def reconnected(self):
        """Whether the connection was broken, and made anew in the background."""
        return self.count("disconnect") == 1 and settle(lambda: self.count("connect") == 2)


def moved(runs=((0, 0, 64),), tensors=2, direction=Direction.READ, region=None, local=BASE):
    step = 4096
    return Movement(
        direction,
        torch.arange(tensors) * step + local,
        torch.arange(tensors) * step + (1 << 40),
        torch.tensor(runs),
        region,
        1,
        local_device=META,
        remote_device="npu:0",
    )

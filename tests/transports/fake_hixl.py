# SPDX-License-Identifier: Apache-2.0
"""An object with the face of CANN's module ``hixl`` that answers as a test wants it to.

For what can't be provoked at will with the real face: sequences of statuses. Bytes are moved by
the simulated module's tests.
"""

from __future__ import annotations

import enum
from collections import deque
from contextlib import nullcontext
from typing import Any, NamedTuple

from llm_datadist_torch.transports.hixl.ports import ModulePort


class TransferStatus(enum.IntEnum):
    WAITING = 0
    COMPLETED = 1
    TIMEOUT = 2
    FAILED = 3


class TransferOp(enum.IntEnum):
    READ = 0
    WRITE = 1


class MemType(enum.IntEnum):
    MEM_DEVICE = 0
    MEM_HOST = 1


class TransferOpDesc(NamedTuple):
    local_addr: int
    remote_addr: int
    len: int


class MemDesc(NamedTuple):
    addr: int
    len: int


class Script:
    """What the next calls of a name return; afterwards the default. Calls are noted."""

    def __init__(self) -> None:
        self.answers: dict[str, deque[Any]] = {}
        self.calls: list[tuple[Any, ...]] = []

    def next(self, name: str, default: Any, *args: Any) -> Any:
        self.calls.append((name, *args))
        queue = self.answers.get(name)
        return queue.popleft() if queue else default

    def then(self, name: str, *answers: Any) -> None:
        self.answers[name] = deque(answers)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class FakeEngine:
    """A ``HixlEngine`` whose HIXL follows a script."""

    TransferStatus, TransferOp, MemType = TransferStatus, TransferOp, MemType
    TransferOpDesc, MemDesc = TransferOpDesc, MemDesc

    def __init__(self) -> None:
        self.script = Script()
        self.port = ModulePort(self)
        self.address = "10.0.0.1:26000"
        self.requests = 0

    def Hixl(self) -> FakeEngine:  # noqa: N802  as in the module
        return self

    def on_device(self) -> Any:
        return nullcontext()

    def connect(self, remote: str, timeout_in_millis: int) -> int:
        return self.script.next("connect", 0, remote)

    def disconnect(self, remote: str, timeout_in_millis: int) -> int:
        return self.script.next("disconnect", 0, remote)

    def register_mem(self, desc: MemDesc, kind: MemType) -> tuple[int, int]:
        return self.script.next("register_mem", (0, desc.addr), desc, kind)

    def deregister_mem(self, handle: int) -> int:
        return self.script.next("deregister_mem", 0, handle)

    def transfer_async(self, remote: str, op: TransferOp, descs: list[Any]) -> tuple[int, int]:
        self.requests += 1
        return self.script.next("transfer_async", (0, self.requests), op, descs)

    def get_transfer_status(self, request: int) -> tuple[int, TransferStatus]:
        return self.script.next("get_transfer_status", (0, TransferStatus.COMPLETED), request)

# SPDX-License-Identifier: Apache-2.0
"""A transport of somebody else's: reads and writes a peer's memory through /proc/PID/mem."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import msgspec
import torch

from llm_datadist_torch.transports.base import (
    Capabilities,
    Channel,
    Direction,
    Fit,
    MemoryKind,
    Movement,
    Relay,
    Transport,
    timed_out,
)
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Offer(msgspec.Struct):
    """What a peer must know: which host, which process."""

    boot_id: str
    pid: int


class ProcMemTransport(Transport):
    """Moves host memory between processes of one host, through the kernel."""

    name = "procmem"
    preference = 10  # `local` has 100, `hixl` 50: only where those can't serve, or when asked for
    capabilities = Capabilities(
        host_memory=True,
        device_memory=False,
        same_process=True,
        same_host=True,
        between_hosts=False,
        cancel=True,
        needs_registration=False,
    )

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:
        if not os.access("/proc/self/mem", os.R_OK | os.W_OK):
            return "there is no /proc/self/mem: mount /proc"
        return None

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(Offer(BOOT_ID.read_text(), os.getpid()))

    def connect(self, offer: bytes, relay: Relay) -> Channel:
        peer = msgspec.msgpack.decode(offer, type=Offer)
        return ProcMemChannel(peer.pid, here=peer.boot_id == BOOT_ID.read_text())

    def close(self) -> None:
        pass  # the channels, which are closed by then, held everything


class Memory:
    """An open /proc/PID/mem, closed with the last reference: a link may end during a movement."""

    def __init__(self, pid: int) -> None:
        self.file = os.open(f"/proc/{pid}/mem", os.O_RDWR)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class ProcMemChannel(Channel):
    def __init__(self, pid: int, *, here: bool) -> None:
        self._memory: Memory | None = None
        self._problem = "" if here else "the peer is on another host"
        if here:
            try:
                self._memory = Memory(pid)
            except OSError as error:
                self._problem = f"{error}: run both processes as one user"

    def fit(self, kind: MemoryKind) -> Fit:
        if kind is MemoryKind.DEVICE:
            return Fit.none("it moves host memory only")
        return Fit.none(self._problem) if self._problem else Fit.good("same host")

    def move(self, movement: Movement, deadline: Deadline) -> str:
        memory = self._memory
        if memory is None:
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, f"procmem: {self._problem}")
        # preadv and pwritev give up the GIL while they work, and answer to an address that is not
        # mapped, on either side, with an error.
        call = os.preadv if movement.direction is Direction.READ else os.pwritev
        runs = zip(*(column.tolist() for column in movement.expanded()), strict=True)
        for local, remote, nbytes in runs:
            done = 0
            while done < nbytes:
                if deadline.expired:
                    raise timed_out(deadline)
                here = (ctypes.c_char * (nbytes - done)).from_address(local + done)
                try:
                    done += call(memory.file, [here], remote + done)
                except OSError as error:
                    raise error_for(LLMStatusCode.LLM_FAILED, f"procmem: {error}") from error
        return "procmem"

    def forget(self, region_id: int) -> None:
        pass  # nothing is set up per region

    def close(self) -> None:
        self._memory, self._problem = None, "the link has ended"

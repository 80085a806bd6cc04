# SPDX-License-Identifier: Apache-2.0
"""Processes under the simulator in which tests drive the module ``hixl``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.simulated import ROOT, environment

ANSWER_S = 100


def command(scheduler: str, service: list[str]) -> list[str]:
    simulator = ["--scheduler", scheduler, "--seed", "7", "--"]
    return [sys.executable, "-m", "ascend_sim", *simulator, *service]


class Peer:
    """One process; calling it runs code there and returns the last expression's value."""

    def __init__(self, scheduler: str = "lazy", **extra: str) -> None:
        ours, theirs = socket.socketpair()
        module = "tests.hixl_service"
        service = [sys.executable, "-m", module, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command(scheduler, service),
            cwd=ROOT,
            env=environment(**extra),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def __call__(self, code: str, **names: Any) -> Any:
        self.begin(code, **names)
        return self.answer()

    def begin(self, code: str, **names: Any) -> None:
        """Runs code without waiting for it; ``answer`` does."""
        self._connection.send((textwrap.dedent(code), names))

    def answer(self) -> Any:
        if not self._connection.poll(ANSWER_S):
            raise AssertionError(f"no answer within {ANSWER_S} s")
        try:
            ok, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait(5)
            raise AssertionError(f"the peer died: {self._process.returncode}") from None
        assert ok, f"the peer failed:\n{value}"
        return value

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """All of the process sleeps meanwhile."""
        self._process.send_signal(signal.SIGSTOP)
        # A child that stopped is reported once to its parent: then all its threads sleep.
        os.waitpid(self._process.pid, os.WUNTRACED)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


def free_name(host: str = "127.0.0.1") -> str:
    """A name for an engine that listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def peers(scheduler: str = "lazy") -> Iterator[tuple[Peer, Peer]]:
    """Two processes, started at the same time."""
    both = Peer(scheduler), Peer(scheduler)
    try:
        yield both
    finally:
        for peer in both:
            peer.close()


def pattern(start: int, size: int) -> bytes:
    """Bytes of which no two ranges in one page are the same."""
    page = bytes((start + 7 * i + i // 256) % 251 for i in range(4096))
    return (page * -(-size // 4096))[:size]

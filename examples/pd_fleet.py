# SPDX-License-Identifier: Apache-2.0
"""The processes of `pd_generate.py`, seen from the one that starts them.

Nothing here can wait for ever: every wait has a limit, a process that fails or dies ends the wait
with its traceback or its exit code, and leaving the fleet ends every process that is still there.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from typing_extensions import Self

POLL_S = 0.25  # how often a wait looks for processes that have died
JOIN_S = 5.0


@dataclass(frozen=True)
class Settings:
    """What is the same for every process."""

    num_blocks: int = 256
    timeout_s: float = 120.0  # a process that hears nothing for so long gives up
    num_prefill: int = 1
    device: str = "auto"  # as LLMConfig.device
    damage: bool = False  # zero what was pulled, so that the final comparison has to fail


@dataclass(frozen=True)
class Event:
    """Something that a process tells the router."""

    sender: str
    kind: str  # ready, linked, prefilled, pulled, progress, done, stopped, error
    data: dict[str, Any] = field(default_factory=dict)


def run(role: str, number: int, settings: Settings, inbox: Queue[Any], events: Queue[Any]) -> None:
    """The main function of a process; a failure becomes an event that carries its traceback."""
    # Ctrl-C reaches every process of the terminal; the router's way of ending is the tidy one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name = f"{role} {number}"
    try:
        # Here and not above: it takes seconds, which the processes can spend side by side.
        from pd_workers import decode_process, prefill_process

        main = prefill_process if role == "prefill" else decode_process
        main(name, number, settings, inbox, events)
        events.put(Event(name, "stopped"))
    except Exception:  # noqa: BLE001  every failure is the router's to show
        events.put(Event(name, "error", {"traceback": traceback.format_exc()}))
        raise SystemExit(1) from None


class ChildFailedError(RuntimeError):
    """A process failed, died or took too long; the text says which one and why."""


class Fleet:
    """A context manager that starts the processes, carries messages, and ends the processes.

    Args:
        num_prefill: how many prefill processes, named "prefill 0", "prefill 1", ...
        num_decode: how many decode processes, named likewise.
        settings: what every process is told; `timeout_s` also limits the fleet's whole life.
    """

    def __init__(self, num_prefill: int, num_decode: int, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._events = context.Queue()
        self._deadline = time.monotonic() + settings.timeout_s
        self._timeout_s = settings.timeout_s
        self._stopped: set[str] = set()
        self._inboxes: dict[str, Any] = {}
        self._processes: dict[str, Any] = {}
        for role, count in (("prefill", num_prefill), ("decode", num_decode)):
            for number in range(count):
                name = f"{role} {number}"
                inbox = self._inboxes[name] = context.Queue()
                arguments = (role, number, settings, inbox, self._events)
                self._processes[name] = context.Process(
                    target=run, args=arguments, name=name, daemon=True
                )

    @property
    def names(self) -> list[str]:
        """The processes, prefill first."""
        return list(self._processes)

    def __enter__(self) -> Self:
        try:
            for process in self._processes.values():
                process.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, name: str, kind: str, data: object) -> None:
        """Puts one message into a process's inbox."""
        self._inboxes[name].put((kind, data))

    def next_event(self) -> Event:
        """Waits for any process's next event.

        Raises:
            ChildFailedError: a process reported a failure, died, or the time is over.
        """
        while True:
            # Who is dead before we look has nothing more to say than what is in the queue now.
            dead = self._dead()
            try:
                event: Event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                if dead:
                    raise ChildFailedError("; ".join(dead)) from None
                if time.monotonic() > self._deadline:
                    raise ChildFailedError(f"not done after {self._timeout_s:g} s") from None
                continue
            if event.kind == "error":
                raise ChildFailedError(f"{event.sender} failed\n{event.data['traceback']}")
            if event.kind == "stopped":
                self._stopped.add(event.sender)
            return event

    def collect(self, kind: str, count: int) -> list[Event]:
        """Waits for `count` events of one kind, when no other kind can come."""
        events: list[Event] = []
        while len(events) < count:
            event = self.next_event()
            if event.kind != kind:
                raise ChildFailedError(f"{event.sender} said {event.kind!r}, expected {kind!r}")
            events.append(event)
        return events

    def close(self) -> None:
        """Waits for processes that have stopped and ends the others."""
        for name, process in self._processes.items():
            if process.pid is None:  # never started
                continue
            if name not in self._stopped:
                process.terminate()
            process.join(JOIN_S)
            if process.is_alive():
                process.kill()
                process.join()
        for inbox in (*self._inboxes.values(), self._events):
            inbox.close()
            inbox.cancel_join_thread()  # nobody reads what a failure left in there

    def _dead(self) -> list[str]:
        """Says which processes have ended without having said "stopped"."""
        return [
            f"{name} died with exit code {process.exitcode}"
            for name, process in self._processes.items()
            if process.exitcode is not None and name not in self._stopped
        ]

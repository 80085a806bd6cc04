# SPDX-License-Identifier: Apache-2.0
"""Our connection to one peer's HIXL engine: made when needed, broken to stop a transfer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm_datadist_torch.transports.base import timed_out
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.messages import Registered
from llm_datadist_torch.transports.hixl.ranges import RangeTable, RegisteredRange
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.transports.hixl.statuses import (
    ALREADY_CONNECTED,
    NOT_CONNECTED,
    SUCCESS,
    TIMEOUT,
    hixl_error,
    meaning_of,
)
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_DISCONNECT_MS = 10_000
_DISCONNECT_ATTEMPTS = 3
_CONNECT_MS = 3_000
MIN_CONNECT_MS = 200
"""What HIXL wants for it at least."""

_POLL_S = 0.01
QUIET_S = 0.2
"""How long nothing must have been registered before a connection is renewed: once per burst."""
_LONGEST_QUIET_S = 30.0
_PATIENCE = 25
"""After so many times that long it is renewed although registrations go on."""
_CALM_S = 30.0
"""If it has served so long since it was renewed, it may be renewed early again."""

OURS, PEERS = "ours", "the peer's"
"""Whose memory is being deregistered, for `Connection.suspend`."""


class Generations(NamedTuple):
    """Of two engines: the latest registrations that a connection reaches, or a movement needs."""

    local: int
    remote: int

    def reaches(self, needed: Generations) -> bool:
        """Whether a connection of these generations serves a movement that needs those."""
        return self.local >= needed.local and self.remote >= needed.remote


class Connection:
    """The way from our engine to one other; HIXL's connections have one direction.

    One object per peer's engine for the life of ours, so that a link that has ended and one that
    is relinked never undo each other's connection.

    Thread safety: all methods may be called from any thread. Those that say so never block, for
    the thread that serves links.

    Args:
        engine: Ours.
        remote: The peer's, spelt exactly as it spells itself.
        memory: What is registered with ours.
    """

    def __init__(self, engine: HixlEngine, remote: str, memory: Registrations) -> None:
        self._engine = engine
        self.remote = remote
        self._memory = memory
        self._changed = threading.Condition(threading.Lock())
        self._up = False
        self._round = 0
        self._unwanted = False
        self._users = 0
        self._reaches = Generations(0, 0)
        # These are read and set by threads that must not wait for a lock that is held while
        # connecting.
        self._suspended_by: set[str] = set()
        self._draining = False
        """Set while a thread waits for movements under way, to reconnect; new ones wait, too."""
        self._renewing = False
        self._quiet_s = QUIET_S
        self._renewed_at = -_CALM_S
        self._peer_lock = threading.Lock()
        self._peer_ranges: dict[int, RegisteredRange] = {}
        self._peer_generation = 0
        self._peer_changed_at = 0.0
        self.peer_table: RangeTable | None = None
        """What the peer has registered, as far as it has told; None: it has not."""

    # -- what does not block ----------------------------------------------------------------------

    def told(self, message: Registered) -> None:
        """The peer says what it has registered; does not block."""
        told = {one.address: one for one in message.ranges}
        with self._peer_lock:
            if message.whole:
                self._peer_ranges = told
            elif self.peer_table is None:
                return  # what was registered before is not known yet
            else:
                self._peer_ranges |= told
            self.peer_table = RangeTable(self._peer_ranges.values())
            self._peer_generation = message.generation
            self._peer_changed_at = time.monotonic()
        if message.whole:
            self._suspended_by.discard(PEERS)

    def forget_peer(self) -> None:
        """A new link: what the peer has registered must be asked for again; does not block."""
        with self._peer_lock:
            self.peer_table = None
            self._peer_generation = 0
            self._reaches = Generations(self._reaches.local, 0)
        self._suspended_by.discard(PEERS)

    def serves(self, needed: Generations) -> bool:
        """Whether a movement could begin without waiting for a connection that is too old.

        Does not block. If that is so, the connection is renewed in the background.
        """
        if self._suspended_by or self._draining:
            return False
        if not self.is_up or self._unwanted or self._reaches.reaches(needed):
            return True
        self._renew_later()
        return False

    @property
    def is_up(self) -> bool:
        """Whether it is connected, or HIXL could not disconnect it."""
        return self._up or self._unwanted

    # -- for movements ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, needed: Generations, deadline: Deadline) -> Iterator[int]:
        """Connect unless that has been done, anew if the connection does not reach enough.

        Yields:
            A number for :meth:`abandon`: how often it had been broken before.

        Raises:
            LLMTimeoutError: Not within the deadline.
            LLMException: HIXL refused.
        """
        number = self._enter(needed, deadline)
        try:
            yield number
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _enter(self, needed: Generations, deadline: Deadline) -> int:
        if not self._changed.acquire(timeout=deadline.remaining_s()):
            raise timed_out(deadline)
        try:
            while not self._try_to_enter(needed, deadline):
                if deadline.expired:
                    raise timed_out(deadline)
                self._changed.wait(min(_POLL_S, deadline.remaining_s()))
            self._users += 1
            return self._round
        finally:
            self._draining = False  # who still waits for it sets it again
            self._changed.release()

    def _try_to_enter(self, needed: Generations, deadline: Deadline) -> bool:
        if self._suspended_by:
            return False
        if self._unwanted:
            self._disconnect()
        if self._up and self._users and self._draining and self._reaches.reaches(needed):
            return False
        if self._up and not self._reaches.reaches(needed):
            if self._users:
                self._draining = True  # they would lose their transfers
                return False
            self._disconnect()
        if not self._up:
            self._connect(deadline)
        return True

    def broken_since(self, number: int) -> bool:
        """Whether the connection was broken after :meth:`using` had yielded this number."""
        return number != self._round

    def abandon(self, number: int, *, reconnect: bool = True) -> None:
        """Break the connection, which HIXL offers as the only way to stop a transfer; blocks.

        Args:
            number: What :meth:`using` yielded: nothing happens if it was broken since then.
            reconnect: Reconnect in the background, for the next transfer.

        Raises:
            LLMException: HIXL did not disconnect, so it may go on writing.
        """
        with self._changed:
            if number == self._round:
                self._disconnect()
        if reconnect:
            self._in_background(self._reconnect)

    # -- for deregistering ------------------------------------------------------------------------

    def suspend(self, whose: str, deadline: Deadline) -> bool:
        """Disconnect after the movements under way, and stay so until :meth:`resume`.

        Args:
            whose: `OURS` or `PEERS`: whose memory is to be deregistered.
            deadline: When to give up.

        Returns:
            Whether it is disconnected.
        """
        self._suspended_by.add(whose)
        if not self._changed.acquire(timeout=deadline.remaining_s()):
            return False
        try:
            while self._users:
                if deadline.expired or whose not in self._suspended_by:
                    return False
                self._changed.wait(min(_POLL_S, deadline.remaining_s()))
            if self._up or self._unwanted:
                self._disconnect()
            return True
        except LLMException as error:
            logger.warning("%s", error)
            return False
        finally:
            self._changed.release()

    def resume(self, whose: str) -> None:
        """Movements may connect again; does not block."""
        self._suspended_by.discard(whose)

    def suspend_for_peer(self, patience_s: float, disconnected: Callable[[], None]) -> None:
        """The peer wants to deregister: disconnect in the background; does not block.

        Args:
            patience_s: For how long we stay disconnected for a peer that says no more.
            disconnected: Called when that is done.
        """
        self._suspended_by.add(PEERS)

        def stay_away() -> None:
            if self.suspend(PEERS, Deadline.after_ms(int(patience_s * 1000))):
                disconnected()
            until = time.monotonic() + patience_s
            while PEERS in self._suspended_by and time.monotonic() < until:
                time.sleep(_POLL_S)
            self._suspended_by.discard(PEERS)

        self._in_background(stay_away)

    # -- ends -------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Its link has ended: disconnect in the background, unless a new link wants it first."""
        self._unwanted = True
        self._in_background(self._disconnect_unwanted)

    def close(self) -> None:
        """Disconnect now; blocks.

        Raises:
            LLMException: HIXL did not disconnect.
        """
        with self._changed:
            if self._up or self._unwanted:
                self._disconnect()

    # -- in threads of their own ------------------------------------------------------------------

    def _in_background(self, job: Callable[[], None]) -> None:
        name = f"llmdd-hixl-{self.remote}"
        thread = threading.Thread(target=self._logged, args=(job,), name=name, daemon=True)
        # The interpreter starts none when it exits; then close() comes next, and does the rest.
        with contextlib.suppress(RuntimeError):
            thread.start()

    def _logged(self, job: Callable[[], None]) -> None:
        try:
            job()
        except LLMException as error:
            logger.info("HIXL connection to %s: %s", self.remote, error)

    def _reconnect(self) -> None:
        with self.using(Generations(0, 0), Deadline.after_ms(_CONNECT_MS)):
            pass

    def _renew_later(self) -> None:
        with self._peer_lock:
            if self._renewing:
                return
            self._renewing = True
        self._in_background(self._renew)

    def _renew(self) -> None:
        """Reconnect once nothing is being registered any more.

        The next time it waits longer, so that registrations one after the other, whatever their
        pace, do not cost a connection each.
        """
        try:
            if time.monotonic() - self._renewed_at > _CALM_S:
                self._quiet_s = QUIET_S
            self._wait_until_quiet()
            self._quiet_s = min(4 * self._quiet_s, _LONGEST_QUIET_S)
            self._renewed_at = time.monotonic()
            latest = Generations(self._memory.generation, self._peer_generation)
            with self.using(latest, Deadline.after_ms(_CONNECT_MS)):
                pass
        finally:
            self._renewing = False

    def _wait_until_quiet(self) -> None:
        since = time.monotonic()
        while not self._unwanted:
            now = time.monotonic()
            last = max(self._memory.changed_at, self._peer_changed_at)
            if now - last >= self._quiet_s or now - since >= _PATIENCE * self._quiet_s:
                return
            time.sleep(_POLL_S)

    def _disconnect_unwanted(self) -> None:
        with self._changed:
            if self._unwanted:
                self._disconnect()

    # -- with the lock held -----------------------------------------------------------------------

    def _connect(self, deadline: Deadline) -> None:
        remaining_ms = int(deadline.remaining_s() * 1000)
        if remaining_ms < MIN_CONNECT_MS:
            # Too short for HIXL: the next movement shall find it connected.
            self._in_background(self._reconnect)
            raise timed_out(deadline)
        # Before connecting: what is registered meanwhile may or may not be reached.
        reaches = Generations(self._memory.generation, self._peer_generation)
        with self._engine.on_device():
            status = self._engine.port.connect(self.remote, remaining_ms)
            if status == ALREADY_CONNECTED:
                # By itself (AutoConnect), nobody knows when: it may reach less than we want.
                self._engine.port.disconnect(self.remote, _DISCONNECT_MS)
                status = self._engine.port.connect(self.remote, remaining_ms)
        if status != SUCCESS:
            raise hixl_error(
                status,
                f"connect to {self.remote} within {remaining_ms} ms",
                remedy="see that the peer runs, and that both machines' device networks reach each"
                " other (hccn_tool).",
            )
        self._up, self._reaches = True, reaches

    def _disconnect(self) -> None:
        # Until it succeeds nobody may use it: what it was to stop may still be running.
        self._up, self._unwanted = False, True
        self._round += 1
        with self._engine.on_device():
            for _ in range(_DISCONNECT_ATTEMPTS):
                status = self._engine.port.disconnect(self.remote, _DISCONNECT_MS)
                if status in (SUCCESS, NOT_CONNECTED):
                    self._unwanted = False
                    return
                if status != TIMEOUT:
                    break
        raise error_for(
            LLMStatusCode.LLM_FAILED,
            f"HIXL could not disconnect from {self.remote}: {meaning_of(status)[0]} ({status});"
            " transfers that this was to stop may still be running",
            remedy="finalize() this instance before its memory is used for something else.",
        )

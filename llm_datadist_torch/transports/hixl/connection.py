# SPDX-License-Identifier: Apache-2.0
"""Our connection to one peer's HIXL engine: made when needed, broken to be rid of a transfer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import timed_out
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.statuses import (
    ALREADY_CONNECTED,
    NOT_CONNECTED,
    SUCCESS,
    TIMEOUT,
    hixl_error,
    meaning_of,
)
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_DISCONNECT_MS = 10_000
_DISCONNECT_ATTEMPTS = 3
_RECONNECT_MS = 3_000


class Connection:
    """The way from our engine to one other; HIXL's connections have one direction.

    One object per peer's engine for the life of ours, so that a link that has ended and one that
    is made anew never undo each other's connection.

    Thread safety: all methods may be called from any thread.

    Args:
        engine: Ours.
        remote: The peer's, spelt exactly as it spells itself.
    """

    def __init__(self, engine: HixlEngine, remote: str) -> None:
        self._engine = engine
        self.remote = remote
        self._lock = threading.Lock()
        self._up = False
        self._round = 0
        self._unwanted = False

    def ensure(self, deadline: Deadline) -> int:
        """Connect unless that has been done.

        Returns:
            A number for :meth:`abandon`: how often it had been broken before.

        Raises:
            LLMTimeoutError: Not within the deadline.
            LLMException: HIXL refused.
        """
        if not self._lock.acquire(timeout=deadline.remaining_s()):
            raise timed_out(deadline)
        try:
            if self._unwanted:
                self._disconnect()
            if not self._up:
                self._connect(deadline)
            return self._round
        finally:
            self._lock.release()

    def abandon(self, number: int, *, reconnect: bool = True) -> None:
        """Break the connection, which HIXL offers as the only way to stop a transfer; blocks.

        Args:
            number: What :meth:`ensure` returned: nothing happens if it was broken since then.
            reconnect: Connect anew in the background, for the next transfer.

        Raises:
            LLMException: HIXL did not disconnect, so it may go on writing.
        """
        with self._lock:
            if number == self._round:
                self._disconnect()
        if reconnect:
            self._in_background(self._reconnect)

    def leave(self) -> None:
        """Its link has ended: disconnect in the background, unless a new link wants it first."""
        self._unwanted = True
        self._in_background(self._settle)

    def close(self) -> None:
        """Disconnect now; blocks.

        Raises:
            LLMException: HIXL did not disconnect.
        """
        with self._lock:
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
        self.ensure(Deadline.after_ms(_RECONNECT_MS))

    def _settle(self) -> None:
        with self._lock:
            if self._unwanted:
                self._disconnect()

    # -- with the lock held -----------------------------------------------------------------------

    def _connect(self, deadline: Deadline) -> None:
        remaining_ms = int(deadline.remaining_s() * 1000)
        if remaining_ms <= 0:
            raise timed_out(deadline)
        with self._engine.on_device():
            status = self._engine.hixl.connect(self.remote, remaining_ms)
        if status not in (SUCCESS, ALREADY_CONNECTED):
            raise hixl_error(
                status,
                f"connect to {self.remote} within {remaining_ms} ms",
                remedy="see that the peer runs, and that both machines' device networks reach each"
                " other (hccn_tool).",
            )
        self._up = True

    def _disconnect(self) -> None:
        # Until it succeeds nobody may use it: what it was to stop may still be running.
        self._up, self._unwanted = False, True
        self._round += 1
        with self._engine.on_device():
            for _ in range(_DISCONNECT_ATTEMPTS):
                status = self._engine.hixl.disconnect(self.remote, _DISCONNECT_MS)
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

# SPDX-License-Identifier: Apache-2.0
"""The connections that others have made and that are no link: how many, and for how long."""

from __future__ import annotations

import logging
import resource
import time
from typing import Protocol

from llm_datadist_torch.net.timers import Timers

logger = logging.getLogger("llm_datadist_torch")

MAX_STRANGERS = 512
"""Connections without a link at a time; less where the process may open few descriptors."""
STRANGER_S = 10.0
"""How long a connection may be there without a link."""
STRANGER_BYTES = 4 << 20
"""How much may come on a connection before there is a link."""
_LOOK_S = 0.25
_COMPLAIN_S = 10.0


class Complaints:
    """Warnings about strangers: the first at once, then one per 10 s with how many there were."""

    def __init__(self) -> None:
        self._next = 0.0
        self._silent = 0

    def say(self, text: str) -> None:
        """Log it, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._silent += 1
            return
        more = f" (and {self._silent} more complaints about strangers)" if self._silent else ""
        logger.warning("%s%s", text, more)
        self._next, self._silent = now + _COMPLAIN_S, 0


class Stranger(Protocol):
    """A connection that is no link."""

    def turn_away(self, reason: str) -> None:
        """Close it in a way that tells a peer of ours to try again."""


class Strangers:
    """Limits the number of connections without a link, and how long each may stay.

    When a new connection exceeds the limit, the oldest one is closed, beginning with those that
    have not shown yet that they speak this protocol and have the secret. A legitimate peer links
    within milliseconds.

    Thread safety: none; it belongs to the I/O thread.

    Args:
        timers: Of the I/O thread.

    Attributes:
        complaints: What is said about them.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MAX_STRANGERS if soft < 0 else max(8, min(MAX_STRANGERS, soft // 4))
        self._since: dict[Stranger, float] = {}
        self._unproven: dict[Stranger, None] = {}
        self.complaints = Complaints()

    def add(self, stranger: Stranger) -> None:
        """A connection has come, or is a link no more."""
        if not self._since:
            self._timers.set(self._look, [time.monotonic() + _LOOK_S])
        self._since[stranger] = time.monotonic()
        self._unproven[stranger] = None
        while len(self._since) > self._most:
            self.end_oldest(f"there are more than {self._most} of them")

    def end_oldest(self, reason: str) -> bool:
        """Close the one that has been there for longest; whether there was one."""
        for stranger in self._unproven or self._since:
            self.turn_away(stranger, reason)
            return True
        return False

    def prove(self, stranger: Stranger) -> None:
        """It speaks this protocol, and has the secret."""
        self._unproven.pop(stranger, None)

    def discard(self, stranger: Stranger) -> None:
        """It is a link now, or has gone."""
        self._since.pop(stranger, None)
        self._unproven.pop(stranger, None)

    def turn_away(self, stranger: Stranger, reason: str) -> None:
        """Close a connection, whatever it is."""
        self.discard(stranger)
        self.complaints.say(f"a stranger's connection was ended: {reason}")
        stranger.turn_away(reason)

    def _look(self) -> None:
        end = time.monotonic() - STRANGER_S
        for stranger, since in list(self._since.items()):
            if since <= end:
                self.turn_away(stranger, f"it has not linked within {STRANGER_S:g} s")
        if self._since:
            self._timers.set(self._look, [time.monotonic() + _LOOK_S])

    def all(self) -> list[Stranger]:
        """The present connections without a link."""
        return list(self._since)

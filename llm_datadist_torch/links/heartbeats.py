# SPDX-License-Identifier: Apache-2.0
"""Noticing peers that have fallen silent: dead hosts, hung processes, networks that are down."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_datadist_torch.links.link import Link, LinkState
from llm_datadist_torch.links.messages import Ping
from llm_datadist_torch.links.timers import Timers

# In intervals. Looking twice per interval and giving up after 2.5 notices a peer within 3.
_LOOK, _PING_AFTER, _LOST_AFTER = 0.5, 0.75, 2.5
_TURNS = 8
"""Groups of links that are looked at one after the other: 1000 answers at once take 30 ms."""


class Heartbeats:
    """Asks peers that have said nothing for a while, and gives up those that stay silent.

    Every message counts as a sign of life, and an answer is heard by one side and shows the
    question to the other: an idle link costs about two messages per interval, in one direction
    each. Both sides look, each with its own interval.

    Thread safety: all is done in the endpoint's thread.

    Args:
        interval_ms: Time between two signs of life; 0 for no heartbeats.
        links: The links there are.
        lose: Called with a link whose peer is silent, and the reason.
    """

    def __init__(
        self,
        interval_ms: int,
        links: Callable[[], list[Link]],
        lose: Callable[[Link, str], None],
    ) -> None:
        self._interval = interval_ms / 1000
        self._links = links
        self._lose = lose
        self._due = 0.0
        self._turn = 0

    def start(self, timers: Timers) -> None:
        """Begin. To be called before the thread runs."""
        if self._interval:
            self._timers = timers
            self._set(time.monotonic())

    def _set(self, now: float) -> None:
        self._due = now + _LOOK * self._interval / _TURNS
        self._timers.set(self._look, [self._due])

    def _look(self) -> None:
        now = time.monotonic()
        late = now - self._due
        # Time in which this process slept itself says nothing about its peers.
        slept = late if late > _LOOK * self._interval else 0.0
        self._set(now)
        self._turn = (self._turn + 1) % _TURNS
        for link in self._links():
            link.heard_at += slept
            if link.state is not LinkState.LINKED or link.peer % _TURNS != self._turn:
                continue
            silent = now - link.heard_at
            if silent >= _LOST_AFTER * self._interval:
                self._lose(link, f"no sign of life for {silent:.1f} s")
            elif now - max(link.heard_at, link.pinged_at) >= _PING_AFTER * self._interval:
                link.pinged_at = now
                link.post(Ping())

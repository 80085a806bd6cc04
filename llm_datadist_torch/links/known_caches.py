# SPDX-License-Identifier: Apache-2.0
"""What we know of a peer's caches in remote-accessible mode, so that a pull need not ask."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple, TypeAlias

from llm_datadist_torch.links.messages import CacheView, Resolve

MAX_KNOWN = 1024
"""Keys remembered per link, about 1 KiB each; beyond that those used longest ago are forgotten.

Not more: with request keys, of which each is pulled once, every link comes to hold as many.
"""

Question: TypeAlias = tuple[str, int, int, bool | None]


class Known(NamedTuple):
    """What the peer once said of a cache.

    Attributes:
        view: Its answer.
        asks_owner: Whether the bytes went through the peer: it looks itself whether this holds.
    """

    view: CacheView
    asks_owner: bool


def _question(ask: Resolve) -> Question:
    return ask.kind, ask.value, ask.index, ask.paged


class KnownCaches:
    """The peer's answers, by question.

    An answer holds as long as the peer's counters (``CacheView.words``) say so, which the user of
    this table has to check, or as the peer takes a claim on it.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Question, Known] = OrderedDict()

    def get(self, ask: Resolve) -> Known | None:
        """The peer's last answer to this question."""
        with self._lock:
            known = self._known.get(_question(ask))
            if known is not None:
                self._known.move_to_end(_question(ask))
            return known

    def put(self, ask: Resolve, known: Known) -> None:
        """Remember an answer."""
        with self._lock:
            self._known[_question(ask)] = known
            self._known.move_to_end(_question(ask))
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def forget(self, ask: Resolve) -> None:
        """The answer is out of date."""
        with self._lock:
            self._known.pop(_question(ask), None)

    def __len__(self) -> int:
        """Answers remembered."""
        return len(self._known)

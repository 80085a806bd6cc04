# SPDX-License-Identifier: Apache-2.0
"""What we know of a peer's caches in remote-accessible mode, so that a pull need not ask."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

MAX_KNOWN = 1024
"""Keys remembered per link, about 1 KiB each; then those asked for longest ago are forgotten.

Not more: with request keys, of which each is pulled once, every link comes to hold as many.
"""

Query: TypeAlias = tuple[str, int, int, bool | None]
"""What identifies a request for a cache: its kind, value, index and the kind of cache wanted."""


class KnownCaches(OrderedDict[Query, Any]):
    """The peer's caches as it described them (a ``RemoteCache`` of ``movement``), by query.

    A description holds as long as the peer's counters (``CacheView.version``) say so, which the
    movement checks, or as the peer takes a claim on it.

    Thread safety: all methods may be called from any thread.
    """

    def forget(self, query: Query) -> None:
        """What the peer answered is out of date."""
        self.pop(query, None)

    def remember(self, query: Query, cache: object | None) -> None:
        """Remember what the peer answered just now; None: it is to be asked each time."""
        self.pop(query, None)
        self[query] = cache
        while len(self) > MAX_KNOWN:
            self.popitem(last=False)

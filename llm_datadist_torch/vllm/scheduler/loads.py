# SPDX-License-Identifier: Apache-2.0
"""Requests of one prompt that name the same blocks of a producer, as ``n`` > 1 makes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from enum import Enum

MAX_KEPT = 4096
"""Blocks that have been loaded, and that other requests may still name."""


class Decision(Enum):
    """What a request does about blocks that several name."""

    LOADS = "loads"
    WAITS = "waits"
    COMPUTES = "computes"


class LoadDeduplicator:
    """Decides which of several requests loads the blocks that all of them name.

    A producer keeps blocks for one reader. So the first request loads them, the others wait for it,
    and are then computed here: what is full of their blocks is in the prefix cache by then.

    Thread safety: none; all methods are called by the engine's loop, and don't block.
    """

    def __init__(self) -> None:
        self._loads: OrderedDict[Hashable, str] = OrderedDict()
        self._loading: dict[str, Hashable] = {}

    def decide(self, blocks: Hashable, request_id: str) -> Decision:
        """What a request does. To be called again for as long as the answer is ``WAITS``.

        Args:
            blocks: What all of them call the blocks.
            request_id: The request that asks.
        """
        first = self._loads.setdefault(blocks, request_id)
        if first != request_id:
            return Decision.WAITS if first in self._loading else Decision.COMPUTES
        self._loading[request_id] = blocks
        return Decision.LOADS

    def is_first(self, blocks: Hashable, request_id: str) -> bool:
        """Whether no other request loads these blocks, or has."""
        return self._loads.get(blocks, request_id) == request_id

    def loaded(self, request_ids: Iterable[str]) -> None:
        """These requests have loaded their blocks, or never will. Others are left alone."""
        for request_id in request_ids:
            blocks = self._loading.pop(request_id, None)
            if blocks is not None:
                self._loads.move_to_end(blocks)
        while len(self._loads) - len(self._loading) > MAX_KEPT:
            # In order of their ends, so the oldest that has ended comes before most that have not.
            oldest = next(
                blocks for blocks, first in self._loads.items() if first not in self._loading
            )
            del self._loads[oldest]

# SPDX-License-Identifier: Apache-2.0
"""Calls that the I/O thread makes at certain times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

logger = logging.getLogger("llm_datadist_torch")


class Timers:
    """Calls and when they are due, on the monotonic clock.

    Thread safety: none; it belongs to the thread that calls ``run_due``.
    """

    def __init__(self) -> None:
        self._times: dict[Callable[[], None], list[float]] = {}

    def set(self, call: Callable[[], None], times: Iterable[float]) -> None:
        """From now on ``call`` is due at these times, and not at those it was set to before."""
        self._times[call] = sorted(times)

    def wait_s(self) -> float | None:
        """Seconds until something is due; None for never."""
        soonest = min((times[0] for times in self._times.values() if times), default=None)
        return None if soonest is None else max(0.0, soonest - time.monotonic())

    def run_due(self) -> None:
        """Make the calls that are due; what they raise is logged."""
        now = time.monotonic()
        for call, times in list(self._times.items()):
            if times and times[0] <= now:
                times.pop(0)
                # Another call may have set it again meanwhile.
                if not times and self._times.get(call) is times:
                    del self._times[call]
                try:
                    call()
                except Exception:
                    logger.exception("error in the link thread")

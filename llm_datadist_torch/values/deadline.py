# SPDX-License-Identifier: Apache-2.0
"""One point in time that a whole operation must keep, however many steps it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """An instant on the monotonic clock.

    Attributes:
        at_ns: The instant in nanoseconds of ``CLOCK_MONOTONIC``, which the C++ copies read too.
        budget_ms: The time that was given in the beginning, for messages.
    """

    at_ns: int
    budget_ms: int

    @classmethod
    def after_ms(cls, budget_ms: int) -> Deadline:
        """The instant ``budget_ms`` milliseconds from now."""
        return cls(time.monotonic_ns() + budget_ms * 1_000_000, budget_ms)

    def remaining_s(self) -> float:
        """Seconds left; 0.0 when the deadline has passed."""
        return max(0.0, (self.at_ns - time.monotonic_ns()) / 1e9)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic_ns() >= self.at_ns

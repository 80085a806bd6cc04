# SPDX-License-Identifier: Apache-2.0
"""Keep objects until a device has passed a point of a stream."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger("llm_datadist_torch")

_SHORTEST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.01


class Event(Protocol):
    """As much of a torch event as is needed here."""

    def query(self) -> bool:
        """Whether everything recorded has been done."""


class InFlight:
    """Calls back when events have completed.

    One daemon thread looks at the events, and lives only while there are any. It does not wait for
    them in the runtime, because it could not be told to stop there.

    Thread safety: any thread may add.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[Event, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None

    def add(self, event: Event, release: Callable[[], None]) -> None:
        """Have another thread call ``release``, which must not raise, once ``event`` has completed.

        Nothing is called any more when the process ends.
        """
        with self._lock:
            self._pending.append((event, release))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="llm_datadist in flight", daemon=True
                )
                # The runtime goes away at exit; events must not be looked at after that.
                atexit.register(self._forget)
                self._thread.start()

    def __len__(self) -> int:
        """How many events are waited for."""
        return len(self._pending)

    def _watch(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while pending := self._left():
            time.sleep(pause)
            done = {id(entry): entry[1] for entry in pending if _is_done(entry[0])}
            pause = _SHORTEST_PAUSE_S if done else min(2 * pause, _LONGEST_PAUSE_S)
            with self._lock:
                self._pending = [entry for entry in self._pending if id(entry) not in done]
            for release in done.values():
                release()
            del pending, done  # they hold what has been released

    def _left(self) -> list[tuple[Event, Callable[[], None]]]:
        """What is pending; if that is nothing, this thread's end is decided here."""
        with self._lock:
            if not self._pending and self._thread is not None:
                self._thread = None
                atexit.unregister(self._forget)
            return list(self._pending)

    def _forget(self) -> None:
        with self._lock:
            self._pending.clear()
            thread = self._thread
        if thread is not None:
            thread.join()


def _is_done(event: Event) -> bool:
    try:
        return event.query()
    except RuntimeError:
        # A failed device does nothing any more; its next use reports the error.
        logger.exception("the device failed before it was done with a copy")
        return True

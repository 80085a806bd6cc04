# SPDX-License-Identifier: Apache-2.0
"""Telling users what happens to links."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

logger = logging.getLogger("llm_datadist_torch")

LinkEventKind: TypeAlias = Literal["linked", "lost", "relinked", "unlinked"]

_MAX_WAITING = 1024
_CLOSE_S = 1.0


@dataclass(frozen=True)
class LinkEvent:
    """Something happened to a link.

    Attributes:
        peer: The peer's cluster id.
        kind: "linked"; "lost"; "relinked", linked again after it was lost, by either side;
            "unlinked", also of a link that was lost before.
        reason: Why, in words.
        time: When, as ``time.time()`` has it.
    """

    peer: int
    kind: LinkEventKind
    reason: str
    time: float = field(default_factory=time.time)


LinkCallback: TypeAlias = Callable[[LinkEvent], object]


class LinkListener:
    """A callback that is told of links, until :meth:`remove`.

    Thread safety: ``remove`` may be called from any thread, the callback too.
    """

    def __init__(self, events: LinkEvents) -> None:
        self._events = events

    def remove(self) -> None:
        """Call back no more; a call that runs is not waited for. Idempotent."""
        self._events.remove(self)


class LinkEvents:
    """Calls the listeners from a thread of its own, which is there while they are.

    Thread safety: all methods may be called from any thread and, but for ``close``, don't block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: dict[LinkListener, LinkCallback] = {}
        # In C, so that Ctrl-C can't leave it locked.
        self._waiting: queue.SimpleQueue[LinkEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, callback: LinkCallback) -> LinkListener:
        """Call back at each event from now on, one at a time and in order."""
        listener = LinkListener(self)
        with self._lock:
            self._callbacks[listener] = callback
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="llm_datadist_torch.events", daemon=True
                )
                self._thread.start()
        return listener

    def remove(self, listener: LinkListener) -> None:
        """See :meth:`LinkListener.remove`."""
        with self._lock:
            self._callbacks.pop(listener, None)

    def put(self, peer: int, kind: LinkEventKind, reason: str) -> None:
        """Tell the listeners, later."""
        if not self._callbacks:
            return
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put(LinkEvent(peer, kind, reason))
        else:
            logger.warning(
                "the callbacks of on_link_event are %d events behind: cluster %d %s is not told",
                _MAX_WAITING,
                peer,
                kind,
            )

    def close(self) -> None:
        """Tell what is left, and end. A callback that hangs is left behind."""
        thread = self._thread
        if thread is None:
            return
        self._waiting.put(None)
        if thread is not threading.current_thread():
            thread.join(_CLOSE_S)
        # Not before: a close that was interrupted is called again.
        self._thread = None

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            for listener in list(self._callbacks):
                callback = self._callbacks.get(listener)
                # It may have been removed by one before it.
                if callback is None:
                    continue
                try:
                    callback(event)
                except BaseException:  # SystemExit, too, ends this call alone
                    logger.exception("a callback of on_link_event failed on %s", event)

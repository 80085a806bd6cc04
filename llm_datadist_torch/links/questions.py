# SPDX-License-Identifier: Apache-2.0
"""Requests that the programs of two linked instances send each other, about whatever they like."""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from llm_datadist_torch.serving.messages import Answer, Body, refused
from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

MAX_QUESTION_BYTES = 1 << 20
"""Of a request, and of an answer."""
TOLD_AT_ONCE = 16
"""Messages of ``send`` to one peer that its handler has not dealt with; the next one waits."""

_MOST_WAITING = 256
"""Requests of one peer that wait for the handler."""
_MOST_BYTES = 32 << 20
"""Bytes of them."""
_NOT_YET_S = 2.0
"""How long after the start of an instance a request waits for a handler to be set."""
_CLOSE_S = 1.0

STATS_QUERY = b"\0llm_datadist_torch.stats"
"""A request of the library's own: what ``LLMDataDist.stats()`` returns there, as JSON."""
EXAMINE_QUERY = b"\0llm_datadist_torch.examine"
"""Another one: the instance's ``InstanceReport``, as JSON. A zero byte and a port may follow."""
ECHO_QUERY = b"\0llm_datadist_torch.echo"
"""Another one: the time there, and what follows this and a zero byte."""

QuestionHandler: TypeAlias = Callable[[int, bytes], bytes]
"""Called with the peer and what it says; returns the answer."""


class _Request(NamedTuple):
    peer: int
    payload: bytes
    reply: Callable[[Body], None]


class Questions:
    """Calls the handler of an instance's program, in a thread of its own.

    The I/O thread only queues what comes, so a handler may take its time, and may use the instance.

    Thread safety: all methods may be called from any thread, and don't block, but for ``close``.

    Attributes:
        enter_thread: Called first in the thread.
    """

    def __init__(self) -> None:
        self.enter_thread: Callable[[], None] = lambda: None
        self._handler: QuestionHandler | None = None
        self._handler_set = threading.Event()
        self._started_at = time.monotonic()
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._counts: collections.Counter[int] = collections.Counter()
        self._bytes: collections.Counter[int] = collections.Counter()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._own: dict[bytes, QuestionHandler] = {}

    def set_handler(self, handler: QuestionHandler | None) -> None:
        """Have this one answer from now on; None for nobody."""
        self._handler = handler
        self._handler_set.set()

    def answer_own_by(self, handlers: Mapping[bytes, QuestionHandler]) -> None:
        """Have these answer requests of the library's own, by their names.

        They are called with what follows the name and a zero byte.
        """
        self._own = dict(handlers)

    def put(self, peer: int, payload: bytes, reply: Callable[[Body], None]) -> None:
        """Have a peer's request answered, later.

        Args:
            peer: Its cluster id.
            payload: What it says.
            reply: Called with the answer.

        Raises:
            LLMException: LLM_LINK_BUSY: too many of that peer wait.
        """
        with self._lock:
            if self._counts[peer] >= _MOST_WAITING or self._bytes[peer] > _MOST_BYTES:
                raise error_for(
                    LLMStatusCode.LLM_LINK_BUSY,
                    f"{self._counts[peer]} requests of cluster {peer} wait for the handler, and no"
                    f" more than {_MOST_WAITING} or {_MOST_BYTES} bytes may",
                )
            self._counts[peer] += 1
            self._bytes[peer] += len(payload)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name="llm_datadist_torch.requests", daemon=True
                )
                self._thread.start()
        self._waiting.put(_Request(peer, payload, reply))

    def close(self) -> None:
        """Answer nothing any more. A handler that hangs is left behind. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._handler_set.set()
        self._waiting.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)
        # Not before: a close that was interrupted is called again.
        self._thread = None

    def _run(self) -> None:
        self.enter_thread()
        while (request := self._waiting.get()) is not None and not self._closed:
            request.reply(self._answer(request.peer, request.payload))
            with self._lock:
                self._counts[request.peer] -= 1
                self._bytes[request.peer] -= len(request.payload)
                if not self._counts[request.peer]:
                    del self._counts[request.peer], self._bytes[request.peer]

    def _answer(self, peer: int, payload: bytes) -> Body:
        try:
            if (own := self._own_answer(peer, payload)) is not None:
                return Answer(check_payload("the answer", own))
            handler = self._handler
            if handler is None:
                self._handler_set.wait(self._started_at + _NOT_YET_S - time.monotonic())
                handler = self._handler
            if handler is None:
                raise error_for(
                    LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                    "nobody answers questions here",
                    remedy="the peer's program calls on_request().",
                )
            return Answer(check_payload("the answer", handler(peer, payload)))
        except LLMException as error:
            return refused(error)
        except BaseException as error:
            # Whatever a handler raises, SystemExit too, ends this request alone.
            logger.exception("the handler of requests failed")
            return refused(error)

    def _own_answer(self, peer: int, payload: bytes) -> bytes | None:
        if not payload.startswith(b"\0"):
            return None
        end = payload.find(b"\0", 1)
        name = payload if end < 0 else payload[:end]
        handler = self._own.get(name)
        return None if handler is None else handler(peer, payload[len(name) + 1 :])


def check_payload(name: str, payload: bytes) -> bytes:
    """Check what is to be sent.

    Raises:
        TypeError: No bytes.
        LLMParamError: Too many.
    """
    check_isinstance(name, payload, bytes, allow_none=False)
    if len(payload) > MAX_QUESTION_BYTES:
        raise param_error(
            f"{name} has {len(payload)} bytes, at most {MAX_QUESTION_BYTES} are possible",
            remedy="bytes of caches are for pulls and pushes.",
        )
    return payload

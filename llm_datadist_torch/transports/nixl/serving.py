# SPDX-License-Identifier: Apache-2.0
"""What one channel does because its peer asks: a thread of its own, started when it first does."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

import torch

from llm_datadist_torch.transports.base import LeasedCache, MemorySpan
from llm_datadist_torch.transports.nixl.messages import Asked, Expect, Fetch, Stop, runs_in
from llm_datadist_torch.transports.nixl.port import Port
from llm_datadist_torch.transports.nixl.spans import Spans
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

MAX_JOBS = 64
"""That wait at a time; a peer of ours asks for one thing after the other."""

Reply = Callable[[bytes | LLMException], None]


class Serving:
    """Writes to the peer what it fetches, and receives what it pushes.

    While a request lasts it holds the cache itself: the peer's lease may end before its bytes.

    Thread safety: all methods may be called from any thread, and none but :meth:`join` blocks.

    Args:
        memory: What is published here.
    """

    def __init__(self, memory: Spans) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stopped = 0
        self._expected: dict[int, LeasedCache] = {}
        self._sends = Port(receives=False)
        self._receives = Port(receives=True)

    def stop(self, said: Stop) -> None:
        """The peer wants no more of a request."""
        # The peer's numbers grow, and it asks for one thing at a time.
        self._stopped = max(self._stopped, said.number)
        self._add(lambda: self._finish(said))

    def take(self, said: Asked, cache: LeasedCache, reply: Reply) -> None:
        """Carry out what the peer asks, in the background.

        Raises:
            LLMParamError: It leaves the cache, or the lease is not for this.
            LLMLinkBusyError: The peer asks for too much at a time.
        """
        if isinstance(said, Fetch):
            runs = runs_in(said.runs)
            cache.check(runs[0], runs[2])
            self._add_held(cache, lambda: self._fetch(said, runs, cache, reply))
            return
        if not cache.writable:
            raise param_error("the lease is for reading")
        self._add_held(cache, lambda: self._expect(said, cache, reply))

    def _add_held(self, cache: LeasedCache, job: Callable[[], None]) -> None:
        if self._jobs.qsize() >= MAX_JOBS:
            raise error_for(
                LLMStatusCode.LLM_LINK_BUSY,
                f"{self._jobs.qsize()} requests wait, and no more than {MAX_JOBS} may",
            )
        cache.acquire()
        if not self._add(job):
            cache.end()
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "the link has ended")

    def _add(self, job: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._jobs.put(job)
            self._start()
            return True

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="llmdd-nixl", daemon=True)
            # The interpreter starts none when it exits, and then nothing is served any more.
            with contextlib.suppress(RuntimeError):
                self._thread.start()

    def drop(self, span: MemorySpan) -> None:
        """A published span is about to be freed; nothing that is under way uses it."""
        self._sends.drop(span)
        self._receives.drop(span)

    def close(self, *ports: Port) -> None:
        """End everything, and these ports, in the background."""
        with self._lock:
            self._closed = True
            for port in ports:
                self._jobs.put(port.abandon)
            self._jobs.put(None)
            self._start()

    def join(self, timeout_s: float) -> None:
        """Wait for that."""
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout_s)

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("error while serving a peer by NIXL")
        self._sends.abandon()
        self._receives.abandon()
        for cache in self._expected.values():
            cache.end()
        self._expected.clear()

    def _fetch(self, said: Fetch, runs: torch.Tensor, cache: LeasedCache, reply: Reply) -> None:
        def check() -> None:
            if self._closed or said.number <= self._stopped:
                raise error_for(LLMStatusCode.LLM_FAILED, "the peer has given up")

        try:
            check()
            self._sends.register(self._memory.of(cache.addrs, cache.extent))
            self._sends.write(said.ticket, runs, check)
        except LLMException as error:
            reply(error)
        else:
            reply(b"")
        finally:
            cache.end()

    def _expect(self, said: Expect, cache: LeasedCache, reply: Reply) -> None:
        try:
            if said.number <= self._stopped:
                raise error_for(LLMStatusCode.LLM_FAILED, "the peer has given up")
            spans = self._memory.of(cache.addrs, cache.extent)
            self._receives.register(spans)
            ticket = self._receives.ticket(spans)
        except LLMException as error:
            cache.end()
            reply(error)
        else:
            self._expected[said.number] = cache
            reply(ticket)

    def _finish(self, said: Stop) -> None:
        cache = self._expected.pop(said.number, None)
        if cache is not None:
            if said.failed:
                # What is on its way must not land in memory that is used for something else.
                self._receives.abandon()
            cache.end()

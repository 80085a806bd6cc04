# SPDX-License-Identifier: Apache-2.0
"""Transfers of the front door: prepared ones, and what waits for a task."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llm_datadist_torch.links.work import CacheTask
from llm_datadist_torch.memory.streams import Stream
from llm_datadist_torch.values.checks import INT32_MAX, param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for


def milliseconds(timeout_s: float | None, name: str = "timeout_s") -> int | None:
    """Return a time limit in whole milliseconds, at least 1; None stays None.

    Raises:
        TypeError: It is not a number.
        LLMParamError: It is not above 0, or more than int32 milliseconds.
    """
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise TypeError(f"{name} must be seconds or None, but is {type(timeout_s).__name__}")
    if not 0 < timeout_s <= INT32_MAX / 1000:
        raise param_error(f"{name}={timeout_s} is not within (0, {INT32_MAX // 1000}] seconds")
    return max(1, math.ceil(timeout_s * 1000))


class PreparedTransfer:
    """A pull or push that is run many times: its arguments have been converted once.

    ``Peer.prepare_pull`` and ``Peer.prepare_push`` make it. It keeps its local cache, and follows
    the link: after a link was lost and relinked it goes on.

    Thread safety: it may be run from any thread, also several times at once.
    """

    def __init__(
        self,
        cluster_id: int,
        run: Callable[..., None],
        start: Callable[..., CacheTask],
        arguments: dict[str, Any],
    ) -> None:
        self._cluster_id = cluster_id
        self._run = run
        self._start = start
        self._arguments = arguments

    def run(self, *, wait_stream: Stream | None = None, timeout_s: float | None = None) -> None:
        """Move the bytes. Blocks until they have landed.

        Args:
            wait_stream: No byte moves before what is on this stream now is done. None: the calling
                thread's current stream.
            timeout_s: Seconds that this may take. None: the node's ``timeout_s``.

        Raises:
            LLMException: As ``Peer.pull`` and ``Peer.push``.
        """
        timeout = milliseconds(timeout_s)
        self._run(**self._arguments, wait_stream=wait_stream, timeout=timeout)

    def start(
        self, *, wait_stream: Stream | None = None, timeout_s: float | None = None
    ) -> CacheTask:
        """Move the bytes in the background. Does not block.

        Args:
            wait_stream: As for :meth:`run`.
            timeout_s: As for :meth:`run`; counts from when the transfer begins to run.

        Returns:
            A task to wait for, await or cancel; it reports what :meth:`run` raises.
        """
        timeout = milliseconds(timeout_s)
        return self._start(**self._arguments, wait_stream=wait_stream, timeout=timeout)

    async def run_async(
        self, *, wait_stream: Stream | None = None, timeout_s: float | None = None
    ) -> None:
        """Move the bytes while the event loop goes on.

        Cancelling the coroutine cancels the transfer, and waits for its end: when CancelledError is
        raised, nothing reads or writes the local cache any more.

        Args:
            wait_stream: As for :meth:`run`.
            timeout_s: As for :meth:`run`.

        Raises:
            LLMException: As :meth:`run`.
            asyncio.CancelledError: It was cancelled; part of the bytes may have landed.
        """
        await finish(self.start(wait_stream=wait_stream, timeout_s=timeout_s))

    def __repr__(self) -> str:
        return f"PreparedTransfer({self._run.__name__}, peer={self._cluster_id})"


async def finish(task: CacheTask) -> None:
    """Await a task; cancelling this cancels the task and waits for its end.

    Raises:
        LLMException: Why the task failed.
    """
    try:
        await task
    except asyncio.CancelledError:
        task.cancel()
        await _ended(task)
        raise


async def _ended(task: CacheTask) -> None:
    """Wait until a task has ended, however often this is cancelled."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()

    def arrive() -> None:
        if not end.done():
            end.set_result(None)

    def wake(_: CacheTask) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(arrive)

    task.add_done_callback(wake)
    while not end.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([end])


def wait(task: CacheTask, timeout_s: float | None = None) -> None:
    """Block until a task has ended.

    Raises:
        LLMTimeoutError: It runs on after ``timeout_s``.
        LLMException: Why the task failed.
    """
    status = task.synchronize(milliseconds(timeout_s))
    if not task.done():
        raise error_for(LLMStatusCode.LLM_TIMEOUT, f"the transfer still runs after {timeout_s} s")
    failure = task.exception()
    if failure is not None:
        raise failure
    if status != LLMStatusCode.LLM_SUCCESS:
        raise error_for(status, "the transfer failed")

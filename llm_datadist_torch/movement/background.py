# SPDX-License-Identifier: Apache-2.0
"""Transfers in the background: the lease on the local cache, the queue, the errors."""

from __future__ import annotations

import logging
from collections.abc import Callable

from llm_datadist_torch import _C
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.work import CacheTask, Work, as_failure
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")


def start(
    instance: Instance,
    workers: WorkerPool,
    cache: Cache,
    job: Callable[[Work, CacheEntry], None],
    *,
    num_results: int = 1,
    layers_total: int = 1,
    check: Callable[[], None] = lambda: None,
) -> CacheTask:
    """Queue a job that works with a cache of ours, which is leased until the task is done.

    Args:
        instance: Whose call it is.
        workers: The threads that run it.
        cache: The local cache.
        job: What to do.
        num_results: Results of the task.
        layers_total: Layers that it goes through.
        check: What else must hold; what it raises is reported by the task.

    Raises:
        LLMException: LLM_FAILED: the instance is being finalized.
    """
    lease: _C.Lease[CacheEntry] | None = None
    work: Work | None = None
    try:
        check()
        lease = instance.using(cache)
        entry = lease.__enter__()
        work = Work(
            lambda work: job(work, entry),
            num_results,
            layers_total=layers_total,
            release=lease.release,
        )
        task = CacheTask(work)
        workers.submit(work)
    except BaseException as error:
        # Also after Ctrl-C. Work that has begun gives the lease back when it has stopped.
        if work is not None:
            work.cancel()
        elif lease is not None:
            lease.release()
        if work is None and isinstance(error, LLMException):
            return _failed(error, num_results, layers_total)
        raise
    return task


def attempt(work: Work, index: int, move: Callable[[], None]) -> bool:
    """Move bytes; whether that went well. If not, the result says so, and the rest goes on."""
    try:
        move()
    except LLMException as error:
        logger.warning("background transfer failed: %s", error)
        work.fail(index, error)
    except Exception as error:
        logger.exception("background transfer failed")
        work.fail(index, as_failure(error))
    else:
        return True
    return False


def _failed(error: LLMException, num_results: int, layers_total: int) -> CacheTask:
    """A task that failed before it was queued."""

    def job(work: Work) -> None:
        for index in range(num_results):
            work.fail(index, error)

    work = Work(job, num_results, layers_total=layers_total)
    work.run(lambda: None)
    return CacheTask(work)

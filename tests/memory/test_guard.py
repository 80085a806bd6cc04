# SPDX-License-Identifier: Apache-2.0
"""Guards: leases are counted, never lost, and given only where the tensors are where they were."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from llm_datadist_torch import _C, LLMCacheNotFoundError
from llm_datadist_torch.caches.guard import make_guard
from tests.peers import eventually

FOR_EVER = 0


def guard_over(*tensors: torch.Tensor) -> _C.CacheGuard:
    addrs = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    return make_guard("the cache", addrs, tensors[0].nbytes, tensors)


@contextmanager
def interrupted_soon() -> Iterator[None]:
    """Ctrl-C in a while."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_leases_are_counted() -> None:
    guard = guard_over(torch.zeros(4))
    with guard.acquire("value") as value:
        assert (value, guard.leases) == ("value", 1)
        other = guard.acquire(None)
        assert guard.leases == 2
        other.release()
        other.release()
        assert not other.held
        assert guard.leases == 1
    assert guard.leases == 0


def test_a_lease_that_is_dropped_goes_back() -> None:
    guard = guard_over(torch.zeros(4))

    def use() -> None:
        lease = guard.acquire(None)
        assert lease.held
        raise ValueError

    try:
        use()
    except ValueError:
        assert guard.leases == 1  # the traceback has it
    gc.collect()
    assert guard.leases == 0


def test_a_cache_that_has_ended_gives_shared_leases_only() -> None:
    guard, calls = guard_over(torch.zeros(4)), []
    first = guard.acquire(None)
    assert guard.end(lambda: calls.append(guard.leases)) == 1
    with pytest.raises(LLMCacheNotFoundError, match="the cache was freed meanwhile"):
        guard.acquire(None)
    second = guard.share(None)
    first.release()
    assert calls == []
    del second
    assert calls == [0]
    with pytest.raises(LLMCacheNotFoundError):
        guard.share(None)


def test_waiting_for_the_last_lease_gives_no_new_ones() -> None:
    guard, left = guard_over(torch.zeros(4)), []
    lease = guard.acquire(None)
    waiter = threading.Thread(target=lambda: left.append(guard.drain(FOR_EVER)))
    waiter.start()

    def refused() -> bool:
        try:
            guard.acquire(None).release()
        except LLMCacheNotFoundError as error:
            return "is being unregistered" in str(error)
        return False

    assert eventually(refused)
    assert waiter.is_alive()
    lease.release()
    waiter.join(10)
    assert left == [0]


def test_waiting_in_vain_changes_nothing() -> None:
    guard = guard_over(torch.zeros(4))
    with guard.acquire(None):
        assert guard.drain(time.monotonic_ns() + 10_000_000) == 1
        guard.acquire(None).release()
        with interrupted_soon(), pytest.raises(KeyboardInterrupt):
            guard.drain(FOR_EVER)
        guard.acquire(None).release()


def test_what_has_moved_is_named() -> None:
    tensors = [torch.zeros(8), torch.zeros(8)]
    guard = guard_over(*tensors)
    guard.check()
    was = tensors[1].data_ptr()
    tensors[1].set_(torch.ones(8))
    text = f"tensor 1 of the cache has moved from {was:#x} to {tensors[1].data_ptr():#x}"
    for use in (guard.check, lambda: guard.acquire(None)):
        with pytest.raises(LLMCacheNotFoundError, match=text):
            use()
    assert guard.leases == 0


def test_a_storage_that_shrank_in_its_place_is_noticed() -> None:
    memory = torch.zeros(64)
    tensor = memory[:32]
    guard = guard_over(tensor)
    guard.check()
    tensor.set_(torch.from_numpy(memory.numpy()[:16]).untyped_storage(), 0, (16,))
    assert tensor.data_ptr() == memory.data_ptr()
    with pytest.raises(LLMCacheNotFoundError, match="has moved"):
        guard.check()


def test_a_guard_that_has_forgotten_keeps_no_memory() -> None:
    tensor = torch.zeros(8)
    guard = guard_over(tensor)
    storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    del tensor
    assert not storage.expired()
    guard.forget()
    assert storage.expired()


def test_interrupts_lose_no_lease() -> None:
    guard = guard_over(torch.zeros(8))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, count, end = signal.signal(signal.SIGALRM, interrupt), 0, time.monotonic() + 2
    try:
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002)
                while True:
                    with guard.acquire(guard) as value:
                        value.check()
            except KeyboardInterrupt:
                count += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert count > 10
    assert guard.leases == 0

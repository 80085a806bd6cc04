# SPDX-License-Identifier: Apache-2.0
"""Until when a producer keeps blocks, without engines."""

from __future__ import annotations

import pytest

from llm_datadist_torch.vllm.worker.leases import Leases

A, B = 11, 22


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases:
    return Leases(10.0, 5.0, clock)


def claim(leases: Leases, number: int, peer: int, readers: int = 1) -> bool | None:
    (held,) = leases.claim([number], peer, readers)
    return held


def test_read_and_released(leases: Leases) -> None:
    leases.grant(1, "request", ((4, 5),))
    assert claim(leases, 1, A)
    assert leases.take_finished() == set()
    assert leases.still_valid(1)
    assert leases.release(1, A, 1)
    assert leases.take_finished() == {"request"}
    assert leases.take_finished() == set()
    assert leases.num_held == 0


def test_released_twice_is_too_late(leases: Leases) -> None:
    leases.grant(1, "request", ())
    assert leases.release(1, A, 1)
    assert leases.release(1, A, 1) is False
    assert claim(leases, 1, A) is False
    assert not leases.still_valid(1)


def test_nobody_comes(leases: Leases, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    leases.grant(1, "request", ())
    clock.now += 4.9
    assert leases.take_finished() == set()
    clock.now += 0.2
    assert leases.take_finished() == {"request"}
    assert "the blocks of request request are given up: nobody has claimed them" in caplog.text
    assert leases.take_num_expired() == 1
    assert leases.take_num_expired() == 0
    assert claim(leases, 1, A) is False


def test_a_claim_makes_it_last(
    leases: Leases, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    leases.grant(1, "request", ())
    for _ in range(3):
        clock.now += 4
        assert claim(leases, 1, A)
    clock.now += 9
    assert leases.take_finished() == set()
    clock.now += 2
    assert leases.take_finished() == {"request"}
    assert "consumers [11] have not read them within 10.0 s" in caplog.text
    assert leases.release(1, A, 1) is False, "what was read since may be somebody else's"


def test_a_reader_is_gone(leases: Leases) -> None:
    for number in (1, 2, 3):
        leases.grant(number, f"r{number}", ())
    claim(leases, 1, A)
    claim(leases, 2, B)
    leases.peer_gone(A)
    assert leases.take_finished() == {"r1"}
    assert leases.release(1, A, 1) is False
    assert leases.release(2, B, 1)


def test_several_readers(leases: Leases) -> None:
    leases.grant(1, "request", ())
    for peer in (A, B):
        assert claim(leases, 1, peer, 2)
    assert leases.release(1, A, 2)
    assert leases.release(1, A, 2)
    assert leases.take_finished() == set()
    assert leases.release(1, B, 2)
    assert leases.take_finished() == {"request"}


def test_a_peer_that_is_faster_than_the_engine_asks_again(leases: Leases) -> None:
    leases.grant(1, "first", ())
    assert claim(leases, 3, A) is None
    assert leases.release(3, A, 1) is None
    assert leases.num_held == 1, "what was never granted is not kept"
    leases.grant(3, "third", ())
    assert claim(leases, 2, A) is False, "it will never be granted"
    assert claim(leases, 3, A)
    assert leases.release(3, A, 1)
    assert leases.take_finished() == {"third"}


def test_all_of_them_end(leases: Leases) -> None:
    leases.grant(1, "a", ())
    leases.grant(2, "b", ())
    claim(leases, 1, A)
    leases.end_all("the engine sleeps")
    assert leases.take_finished() == {"a", "b"}
    assert leases.release(1, A, 1) is False

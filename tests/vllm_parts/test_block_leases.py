# SPDX-License-Identifier: Apache-2.0
"""Until when a producer keeps blocks, without engines."""

from __future__ import annotations

import pytest

from llm_datadist_torch.vllm.leases import Leases

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
    return Leases(10.0, clock)


def test_read_and_released(leases: Leases) -> None:
    leases.grant(1, "request", (4, 5))
    assert leases.blocks(1) == (4, 5)
    assert leases.claim(1, A, 1)
    assert leases.take_finished() == set()
    assert leases.release(1, A)
    assert leases.take_finished() == {"request"}
    assert leases.take_finished() == set()
    assert leases.num_held == 0


def test_released_twice_is_too_late(leases: Leases) -> None:
    leases.grant(1, "request", ())
    assert leases.release(1, A)
    assert not leases.release(1, A)
    assert not leases.claim(1, A, 1)
    assert leases.blocks(1) is None


def test_nobody_comes(leases: Leases, clock: Clock) -> None:
    leases.grant(1, "request", ())
    clock.now += 9.9
    assert leases.take_finished() == set()
    clock.now += 0.2
    assert leases.take_finished() == {"request"}
    assert not leases.claim(1, A, 1)


def test_a_claim_makes_it_last(leases: Leases, clock: Clock) -> None:
    leases.grant(1, "request", ())
    clock.now += 9
    assert leases.claim(1, A, 1)
    clock.now += 9
    assert leases.take_finished() == set()
    clock.now += 2
    assert leases.take_finished() == {"request"}
    assert not leases.release(1, A), "what was read since may be somebody else's"


def test_a_reader_is_gone(leases: Leases) -> None:
    for number in (1, 2, 3):
        leases.grant(number, f"r{number}", ())
    leases.claim(1, A, 1)
    leases.claim(2, B, 1)
    leases.peer_gone(A)
    assert leases.take_finished() == {"r1"}
    assert not leases.release(1, A)
    assert leases.release(2, B)


def test_several_readers(leases: Leases) -> None:
    leases.grant(1, "request", ())
    for peer in (A, B):
        assert leases.claim(1, peer, 2)
    assert leases.release(1, A)
    assert leases.release(1, A)
    assert leases.take_finished() == set()
    assert leases.release(1, B)
    assert leases.take_finished() == {"request"}


def test_a_peer_that_is_faster_than_the_engine(leases: Leases, clock: Clock) -> None:
    leases.grant(1, "first", ())
    assert leases.claim(3, A, 1)
    assert leases.release(3, A)
    clock.now += 100
    # The engine keeps the blocks of 3 until it has heard of a lease that has ended.
    assert leases.take_finished() == {"first"}
    leases.grant(2, "second", ())
    leases.grant(3, "third", ())
    assert leases.take_finished() == {"third"}
    assert leases.claim(2, B, 1)


def test_a_peer_that_is_faster_and_slow_to_read(leases: Leases) -> None:
    assert leases.claim(1, A, 1)
    leases.grant(1, "request", (7,))
    assert leases.take_finished() == set()
    assert leases.blocks(1) == (7,)
    assert leases.release(1, A)
    assert leases.take_finished() == {"request"}


def test_a_number_that_the_engine_never_grants(leases: Leases, clock: Clock) -> None:
    assert leases.claim(7, A, 1)
    clock.now += 10.1
    assert leases.take_finished() == set()
    assert leases.num_held == 0


def test_numbers_of_an_earlier_life(clock: Clock) -> None:
    leases = Leases(10.0, clock, after=100)
    assert not leases.claim(100, A, 1)
    assert not leases.release(3, A)
    assert leases.claim(101, A, 1)


def test_peers_that_name_what_does_not_exist_fill_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_datadist_torch.vllm.leases.MAX_EARLY", 3)
    now = [0.0]
    leases = Leases(10.0, clock=lambda: now[0])
    assert [leases.claim(number, 5, 1) for number in range(1, 6)] == [True] * 3 + [False] * 2
    assert leases.num_held == 3
    leases.grant(9, "r", (1,))
    assert leases.claim(9, 5, 1), "the engine's own are not limited"
    now[0] = 11.0
    leases.take_finished()
    assert leases.claim(10, 5, 1)

# SPDX-License-Identifier: Apache-2.0
"""Leases of requests that wait for their turn are kept, and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.steps import Expect, Grant, Pull, PushEnd, Renewal, Step
from llm_datadist_torch.vllm.worker.leases import Leases
from llm_datadist_torch.vllm.worker.pulling import Done
from tests.service import eventually
from tests.vllm_parts.workers import Worker


def remotes(p: Worker, count: int, lease_s: float) -> list[RemoteBlocks]:
    """What so many prompts are told, under leases that end soon."""
    found = [p.grant([at + 1], 32) for at in range(count)]
    return [
        RemoteBlocks(
            **{name: getattr(each, name) for name in each.__struct_fields__}
            | {"remote_lease_s": lease_s}
        )
        for each in found
    ]


def test_queued_requests_keep_their_leases(worker: Callable[..., Worker]) -> None:
    """A consumer with room for one of five prompts loses none."""
    p, d = worker(8, 1, claim_s=1.0, lease_s=1.5), worker(20, 2)
    told = remotes(p, 5, 1.5)
    d.half.step(Step(renewals=[Renewal(f"d{at}", remote) for at, remote in enumerate(told)]))
    for at, remote in enumerate(told):
        end = time.monotonic() + 0.9
        while time.monotonic() < end:
            assert p.half.take_done().sent <= {f"p{number + 1}" for number in range(at)}
            time.sleep(0.02)
        d.start(remote, [at + 1], 0, 32, name=f"d{at}")
        done, _ = d.collect({f"d{at}"})
        assert not done.failed
    assert not d.half.take_lost()


def test_what_is_dropped_is_not_kept(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1, claim_s=1.0, lease_s=1.5), worker(20, 2)
    (remote,) = remotes(p, 1, 1.5)
    d.half.step(Step(renewals=[Renewal("d", remote)]))
    d.half.step(Step(drops=["d"]))
    assert p.freed("p1")


def test_leases_that_are_lost_while_requests_wait(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(20, 2)
    first, second = remotes(p, 2, 0.3)
    d.half.step(Step(renewals=[Renewal("d1", first), Renewal("d2", second)]))
    assert eventually(lambda: len(p.half.leases._leases[1].claimed_by) == 1)
    p.half.leases.release(1, 99, 1)
    assert eventually(lambda: "d1" in d.half.take_lost())
    time.sleep(0.5)
    assert not d.half.take_lost(), "said once, and the other is there"


def test_a_hold_that_is_faster_than_the_engine(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(20, 2)
    remote = p.remote(((1,),), 32, 1)
    d.half.step(Step(renewals=[Renewal("d", remote)]))
    time.sleep(0.3)
    assert not d.half.take_lost()
    p.grant([1], 32, 1)
    assert eventually(lambda: p.half.leases._leases[1].claimed_by)


@pytest.mark.parametrize("claims", [0, 1])
def test_the_time_to_claim_is_short(claims: int) -> None:
    now = [0.0]
    leases = Leases(100.0, 5.0, lambda: now[0])
    leases.grant(1, "r", ())
    for _ in range(claims):
        leases.claim([1], 7, 1)
    now[0] = 6.0
    assert leases.take_finished() == (set() if claims else {"r"})


def test_steps_while_the_caches_are_away() -> None:
    remote = RemoteBlocks.of(
        {
            "remote_engine_id": "engine",
            "remote_request_id": "p",
            "remote_lease": 1,
            "remote_lease_s": 1.0,
            "remote_peers": [[5, "127.0.0.1", 7000, "life"]],
            "remote_tp_size": 1,
            "remote_block_ids": [[1]],
            "remote_num_tokens": 32,
            "prompt": "x",
        }
    )
    step = Step(
        pulls=[Pull("d", remote, ((0, 3), (4,)), 0, 32), Pull("e", remote, awaited=False)],
        grants=[Grant(1, "p", ((1,),))],
        expects=[Expect("f", "t", ((7,),), 0, 32, "x"), Expect("g", "u", (), 0, 0, "")],
        push_ends=[PushEnd("q", "t", ()), PushEnd("r", "u", (), kept=False)],
    )
    done = Done.without_caches(step)
    assert done.sent == {"p", "q"}
    assert done.received == {"d", "f"}
    assert done.failed == {"d": {3, 4}, "f": {7}}


def test_a_worker_that_lets_go_of_its_caches(worker: Callable[..., Worker]) -> None:
    """What the engine waits for has failed, and what was kept is free; peers read nothing."""
    p, d = worker(8, 1), worker(20, 2, timeout_s=3.0)
    first, second = p.grant([1], 32), p.grant([2], 32)
    assert not d.pull(first, [3], 0, 32)
    other = worker(8, 3)
    waiting = other.remote(((1,),), 32, 1)
    p.half.step(Step(pulls=[Pull("waits", waiting, ((5,),), 0, 32)]))
    p.half.close()
    done = p.half.take_done()
    assert "p2" in done.sent
    assert done.received == {"waits"}
    assert done.failed == {"waits": {5}}
    assert d.pull(second, [4], 0, 32) == {4}

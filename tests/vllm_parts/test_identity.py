# SPDX-License-Identifier: Apache-2.0
"""Workers are known by the life that they say, whatever ids and addresses users gave them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import msgspec
import pytest
import torch

from llm_datadist_torch.vllm.worker.service import TimeLimit
from tests.service import eventually
from tests.vllm_parts.workers import FINGERPRINT, Worker, snapshot


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("verify", [False, True])
def test_two_engines_with_one_id(
    worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture, *, verify: bool
) -> None:
    a, b = (worker(8, seed, cluster_id=1, claim_s=1.0) for seed in (1, 2))
    d = worker(16, 3, verify=verify)
    assert not d.pull(a.grant([1], 32), [3], 0, 32)
    before = snapshot(d)
    with caplog.at_level(logging.WARNING):
        assert d.pull(b.grant([2], 32), [4], 0, 32) == {4}
    assert "is another worker now" in caplog.text
    assert "two engines have one cluster_id" in caplog.text
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in before.items())
    assert b.freed("p1"), "nobody has claimed it"
    assert a.half.leases.num_held == 0, "A was told nothing of B's lease"


def test_a_claim_that_reaches_another_life(worker: Callable[..., Worker]) -> None:
    """The owner itself refuses: what its peer knew of the link may be old."""
    p, d = worker(8, 1), worker(8, 2)
    assert not d.pull(p.grant([1], 32), [3], 0, 32)
    remote = p.grant([2], 32)
    (peer,) = remote.remote_peers
    other = msgspec.structs.replace(peer, life="other")
    service = d.half._service
    # The event of the link, which another thread tells, may have made it forget what it knew.
    told = service.meet(peer, TimeLimit(5.0))
    service._met[peer.cluster_id] = msgspec.structs.replace(told, life="other")
    assert d.pull(msgspec.structs.replace(remote, remote_peers=(other,)), [4], 0, 32) == {4}
    assert p.half.leases.num_held == 1


@pytest.mark.parametrize("verify", [False, True])
def test_a_producer_that_comes_back_with_other_blocks(
    worker: Callable[..., Worker], *, verify: bool
) -> None:
    port = free_port()
    first = worker(40, 1, cluster_id=5, port=port, block=64)
    d = worker(16, 2, block=128, verify=verify)
    assert not d.pull(first.grant([1], 60), [3], 0, 60)
    first.half.close()
    second = worker(10, 7, cluster_id=5, port=port, block=256)
    # As long as the first one's end has not been noticed, loads fail.
    assert eventually(lambda: not d.pull(second.grant([2], 60), [5], 0, 60))
    for name, tensor in d.kv.items():
        for head in range(2):
            # K transposed, then V: 60 of 128 tokens, of 256 there.
            mine, theirs = tensor[5, head].view(2, -1), second.kv[name][2, head].view(2, -1)
            for token in range(60):
                assert torch.equal(mine[0].view(8, 128)[:, token], theirs[0].view(8, 256)[:, token])
                assert torch.equal(mine[1].view(128, 8)[token], theirs[1].view(256, 8)[token])


def test_a_producer_that_comes_back_with_another_model(
    worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    first = worker(8, 1, cluster_id=5, port=port)
    d = worker(8, 2)
    old = first.grant([2], 32)
    assert not d.pull(first.grant([1], 32), [3], 0, 32)
    first.half.close()
    second = worker(
        8, 3, msgspec.structs.replace(FINGERPRINT, weights="others"), cluster_id=5, port=port
    )
    before = snapshot(d)
    with caplog.at_level(logging.WARNING):
        assert d.pull(old, [4], 0, 32) == {4}, "a lease of the first life"
        assert d.pull(second.grant([1], 32), [5], 0, 32) == {5}
    assert "weights is 'w' here and 'others' there" in caplog.text
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in before.items())


def test_clocks_mean_nothing(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose clock is an hour ahead of its scheduler's serves valid claims."""
    with monkeypatch.context() as ahead:
        ahead.setattr("time.time_ns", lambda: 2**62)
        ahead.setattr("time.time", lambda: 2.0**32)
        p = worker(8, 1)
    d = worker(8, 2)
    number = 1
    remote = p.remote(((1,),), 32, number)
    d.start(remote, [3], 0, 32)
    # It comes before its lease is granted, and waits for that.
    assert not d.collect({"d"}, 0.3)[0].received
    p.grant([1], 32, number)
    assert not d.wait()
    assert all(torch.equal(d.kv[name][3], p.kv[name][1]) for name in p.kv)


def test_parameters_that_lead_back(worker: Callable[..., Worker]) -> None:
    """An engine that both produces and consumes serves its own requests."""
    both = worker(8, 1, claim_s=60.0)
    expected = snapshot(both)
    both.start(both.grant([1, 2], 64), [5, 6], 32, 64)
    done, _ = both.collect({"d"})
    assert done.received == {"d"}
    assert not done.failed
    for name, tensor in expected.items():
        tensor[6] = tensor[2]
        assert torch.equal(both.kv[name], tensor)
    assert "p1" in done.sent or both.freed("p1")
    assert not both.half._service.datadist.links()

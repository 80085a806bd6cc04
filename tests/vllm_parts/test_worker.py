# SPDX-License-Identifier: Apache-2.0
"""The workers' half of the connector with tensors of vLLM's kind, without vLLM."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from llm_datadist_torch.vllm.layouts import Kind
from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Pull, Renewal, Step
from llm_datadist_torch.vllm.worker.pulling import Done, Puller
from tests.vllm_parts.workers import (
    BLOCK,
    FINGERPRINT,
    HEADS,
    LAYERS,
    Worker,
    group,
    snapshot,
)


@pytest.mark.parametrize("verify", [False, True])
def test_pages_arrive_where_they_belong(worker: Callable[..., Worker], verify: bool) -> None:
    p, d = worker(8, 1), worker(20, 2, verify=verify)
    expected = snapshot(d)
    assert not d.pull(p.grant([5, 2, 7], 90, 1), [11, 3, 19], 32, 90)
    for name, tensor in expected.items():
        # The first block was there already.
        tensor[3], tensor[19] = p.kv[name][2], p.kv[name][7]
        assert torch.equal(d.kv[name], tensor)
    assert p.freed("p1")


def test_both_pull_at_the_same_time(worker: Callable[..., Worker]) -> None:
    a, b = worker(8, 1), worker(8, 2)
    expected = {name: (a.kv[name][1].clone(), b.kv[name][2].clone()) for name in a.kv}
    of_a, of_b = a.grant([1], 32, 1), b.grant([2], 32, 1)
    a.start(of_b, [3], 0, 32)
    b.start(of_a, [4], 0, 32)
    assert not a.wait()
    assert not b.wait()
    for name, (from_a, from_b) in expected.items():
        assert torch.equal(a.kv[name][3], from_b)
        assert torch.equal(b.kv[name][4], from_a)


def test_many_at_the_same_time(worker: Callable[..., Worker]) -> None:
    producers, d = [worker(32, seed) for seed in (1, 2)], worker(64, 3)
    pulls = [
        Pull(f"d{at}", producers[at % 2].grant([at], 32), ((at + 1,),), 0, 32)
        for at in range(1, 31)
    ]
    d.half.step(Step(pulls=pulls))
    done, _ = d.collect({pull.request_id for pull in pulls})
    assert len(done.received) == len(pulls)
    assert not done.failed
    for at in range(1, 31):
        for name, tensor in d.kv.items():
            assert torch.equal(tensor[at + 1], producers[at % 2].kv[name][at])


def shared(workers: list[Worker], number: int, blocks: list[int], tokens: int) -> RemoteBlocks:
    """What an engine of several workers keeps."""
    told = [each.grant(blocks, tokens, number) for each in workers]
    return msgspec.structs.replace(
        told[0],
        remote_peers=tuple(peer for each in told for peer in each.remote_peers),
        remote_tp_size=len(workers),
    )


def test_one_worker_reads_from_two(worker: Callable[..., Worker]) -> None:
    producers, d = [worker(8, 10 + rank, rank=rank, ranks=2) for rank in (0, 1)], worker(8, 2)
    assert not d.pull(shared(producers, 1, [5, 2], 64), [1, 3], 0, 64)
    for name, tensor in d.kv.items():
        for rank, p in enumerate(producers):
            assert torch.equal(tensor[[1, 3], rank], p.kv[name][[5, 2], 0])
    assert all(p.freed("p1") for p in producers)


def test_two_workers_read_from_one(worker: Callable[..., Worker]) -> None:
    p, consumers = worker(8, 1), [worker(8, 20 + rank, rank=rank, ranks=2) for rank in (0, 1)]
    remote = p.grant([5, 2], 64, 1)
    assert not consumers[0].pull(remote, [1, 3], 0, 64)
    assert not p.half.take_done().sent, "the other has not read yet"
    assert not consumers[1].pull(remote, [1, 3], 0, 64)
    for name, tensor in p.kv.items():
        for rank, d in enumerate(consumers):
            assert torch.equal(d.kv[name][[1, 3], 0], tensor[[5, 2], rank])
    assert p.freed("p1")


def test_two_workers_read_from_two(worker: Callable[..., Worker]) -> None:
    producers = [worker(8, 10 + rank, rank=rank, ranks=2) for rank in (0, 1)]
    consumers = [worker(8, 20 + rank, rank=rank, ranks=2) for rank in (0, 1)]
    remote = shared(producers, 1, [5, 2], 64)
    for p, d in zip(producers, consumers, strict=True):
        assert not d.pull(remote, [1, 3], 0, 64)
        assert all(torch.equal(d.kv[name][[1, 3]], kv[[5, 2]]) for name, kv in p.kv.items())
        assert p.freed("p1")


def test_only_released(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    expected = snapshot(d)
    d.half.step(Step(pulls=[Pull("d", p.grant([1], 32, 1), awaited=False)]))
    assert p.freed("p1")
    assert d.half.take_done() == Done(), "the engine does not wait for it"
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in expected.items())


def test_a_lease_that_has_ended(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1, claim_s=1.0), worker(8, 2)
    remote = p.grant([1, 2], 64, 1)
    assert p.freed("p1")
    assert d.pull(remote, [3, 4], 0, 64) == {3, 4}


def test_a_lease_that_ends_during_the_pull(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes may be somebody else's, though the pull itself went well."""
    p, d = worker(8, 1, lease_s=1.0), worker(8, 2)
    fetch_rows = Puller.fetch_rows

    def late(*args: Any) -> None:
        assert p.freed("p1")
        fetch_rows(*args)

    monkeypatch.setattr(Puller, "fetch_rows", late)
    assert d.pull(p.grant([1, 2], 64, 1), [3, 4], 32, 64) == {4}


@pytest.mark.parametrize(
    "field", ["vllm", "platform", "weights", "config", "dtype", "kv_dtype", "kernel"]
)
def test_other_kv_is_refused(
    worker: Callable[..., Worker], field: str, caplog: pytest.LogCaptureFixture
) -> None:
    p = worker(8, 1)
    d = worker(8, 2, msgspec.structs.replace(FINGERPRINT, **{field: "other"}))
    expected = snapshot(d)
    with caplog.at_level(logging.WARNING):
        assert d.pull(p.grant([1], 32, 1), [3], 0, 32) == {3}
    assert f"{field} is 'other' here" in caplog.text
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in expected.items())
    assert p.freed("p1")


def test_the_producer_is_gone(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    linked, unlinked = p.grant([1], 32, 1), p.grant([2], 32, 2)
    assert not d.pull(linked, [3], 0, 32)
    p.half.close()
    assert d.pull(unlinked, [4], 0, 32) == {4}
    assert worker(8, 3).pull(unlinked, [5], 0, 32) == {5}


def test_the_consumer_is_gone(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, d = worker(8, 1), worker(8, 2)
    reached, go_on = threading.Event(), threading.Event()

    def stuck(*args: Any) -> None:
        reached.set()
        go_on.wait(60)

    monkeypatch.setattr(Puller, "fetch_rows", stuck)
    d.start(p.grant([1], 32, 1), [3], 0, 32)
    assert reached.wait(60)
    # As if its process had died.
    d.half._service.datadist.finalize()
    assert p.freed("p1")
    go_on.set()
    assert d.wait() == {3}


def test_bytes_that_are_wrong(
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    p, d = worker(8, 1), worker(8, 2, verify=True)
    fetch_rows = Puller.fetch_rows

    def flipped(*args: Any) -> None:
        fetch_rows(*args)
        d.kv["c"][4, 1, 31, 15] += 1

    monkeypatch.setattr(Puller, "fetch_rows", flipped)
    with caplog.at_level(logging.WARNING):
        assert d.pull(p.grant([1, 2], 64, 1), [3, 4], 0, 64) == {3, 4}
    assert "differ in their checksums" in caplog.text
    assert p.freed("p1")


def test_questions_that_are_none(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    assert not d.pull(p.grant([1], 32), [3], 0, 32)
    remote = p.grant([2], 32)
    request = d.half._service.datadist.request
    peer = remote.remote_peers[0]
    rows = torch.tensor([0, 8]).numpy().tobytes()
    sums = {
        "type": "Checksums",
        "life": peer.life,
        "lease": remote.remote_lease,
        "cache": 0,
        "layers": [0, 3],
        "rows": rows,
    }
    for payload in (
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Claim", "life": "", "leases": ["x"], "readers": 1}),
        msgspec.msgpack.encode(sums),
        msgspec.msgpack.encode(sums | {"cache": 50}),
        msgspec.msgpack.encode(sums | {"layers": [0, 4]}),
        msgspec.msgpack.encode(sums | {"rows": b"123"}),
    ):
        with pytest.raises(ValueError, match=r"no question|no such rows|no layers|out of range"):
            request(peer.cluster_id, payload)
    assert not d.pull(remote, [4], 0, 32)


@pytest.mark.parametrize(
    "extra",
    [
        {"lease": 5},
        {"claim_s": 0},
        {"mode": "shove"},
        {"port": True},
        {"port": -1},
        {"port": "7000"},
        {"lease_s": 0},
        {"verify": 1},
        {"threads": 0},
        {"cluster_id": 2**60},
    ],
)
def test_settings_that_are_none(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))):
        Settings.of(extra)


def test_settings() -> None:
    assert Settings.of({}) == Settings()
    given = {"mode": "push", "host": "10.0.0.1", "port": 7000, "lease_s": 5, "verify": True}
    assert dataclasses.asdict(Settings.of(given)) == dataclasses.asdict(Settings()) | given


def test_so_many_workers_can_not_share_the_heads(
    worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters come from clients: they end no engine."""
    p, d = worker(8, 1), worker(8, 2)
    remote = p.grant([1], 32)
    remote = msgspec.structs.replace(remote, remote_peers=remote.remote_peers * 3, remote_tp_size=3)
    d.half.step(Step(renewals=[Renewal("d", remote)]))
    with caplog.at_level(logging.WARNING):
        assert d.pull(remote, [3], 0, 32) == {3}
    assert "2 KV heads can't be shared by 3 workers" in caplog.text


def test_several_groups(worker: Callable[..., Worker]) -> None:
    """Full attention, a window and states, each under block tables of its own, in shared memory."""
    groups = [
        group("full"),
        group("sliding", kind=Kind.WINDOW, window=40),
        group("state", kind=Kind.STATE, block=0),
    ]

    def made() -> dict[str, Any]:
        shared = torch.randn(20, 2, 32, 16)
        states = [torch.randn(20, 24), torch.randn(20, 2, 8)]
        return {"full": shared, "sliding": shared, "state": states}

    p = worker(20, 1, kv=made(), groups=groups)
    d = worker(20, 2, kv=made(), groups=groups, verify=True)
    remote = p.grant_groups(((1, 2, 3, 4), (0, 6, 7, 8), (9,)), 128)
    here = ((11, 12, 13, 14), (0, 0, 17, 18), (19,))
    d.half.step(Step(pulls=[Pull("d", remote, here, 0, 128)]))
    assert not d.wait()
    assert torch.equal(d.kv["full"][[11, 12, 13, 14]], p.kv["full"][[1, 2, 3, 4]])
    assert torch.equal(d.kv["full"][[17, 18]], p.kv["full"][[7, 8]])
    for mine, theirs in zip(d.kv["state"], p.kv["state"], strict=True):
        assert torch.equal(mine[19], theirs[9])
    p.half.leases.end_all("the test has it so")
    d.half.step(Step(pulls=[Pull("d", remote, here, 96, 128)]))
    assert d.wait() == {14, 18, 19}


def test_what_is_counted(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1, claim_s=0.5), worker(8, 2)
    assert not d.pull(p.grant([1, 2], 64), [3, 4], 0, 64)
    assert p.freed("p1")
    late = p.grant([1], 32)
    assert p.freed("p2")
    assert d.pull(late, [3], 0, 32) == {3}
    counts = d.half.take_counts()
    assert len(counts["load_seconds"]) == 1
    assert counts["load_bytes"] == [2 * LAYERS * HEADS * BLOCK * 16 * 4]
    assert counts["failed_loads"] == 1
    counts = p.half.take_counts()
    assert (counts["sent_prompts"], counts["expired_leases"]) == (1, 1)

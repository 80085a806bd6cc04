# SPDX-License-Identifier: Apache-2.0
"""The workers' half of the connector with tensors of vLLM's kind, without vLLM."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import describe
from llm_datadist_torch.vllm.leases import lease_number_now
from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.pulling import Puller
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Grant, Pull, Step
from llm_datadist_torch.vllm.worker import WorkerHalf
from tests.service import settle

FINGERPRINT = Fingerprint(
    vllm="1", model="m", config="c", dtype="float32", kv_dtype="auto", kernel="k"
)
LAYERS, HEADS = 3, 2


class Worker:
    """A worker with KV that all differs."""

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        fingerprint: Fingerprint = FINGERPRINT,
        rank: int = 0,
        ranks: int = 1,
        **settings: Any,
    ) -> None:
        torch.manual_seed(seed)
        storage = torch.randn(LAYERS, num_blocks, HEADS // ranks, 32, 16)
        self.kv = dict(zip("abc", storage, strict=True))
        layout, groups = describe(
            self.kv,
            block_size=32,
            tp_rank=rank,
            tp_size=ranks,
            total_kv_heads=HEADS,
            arrangement="cpu/vec",
        )
        given = Settings.of({"timeout_s": 20.0} | settings)
        self.half = WorkerHalf(given, fingerprint, layout, groups)

    def grant(self, number: int, blocks: list[int], num_tokens: int) -> RemoteBlocks:
        """Keep blocks, and say so."""
        self.half.step(Step(grants=[Grant(number, f"p{number}", tuple(blocks))]))
        return RemoteBlocks(
            remote_engine_id="engine",
            remote_request_id=f"p{number}",
            remote_lease=number,
            remote_peers=(self.half.address,),
            remote_block_ids=tuple(blocks),
            remote_num_tokens=num_tokens,
            prompt="",
            digest=self.half.digest,
        )

    def pull(self, remote: RemoteBlocks, blocks: list[int], first: int, tokens: int) -> set[int]:
        """Pull and wait; the blocks that failed."""
        self.half.step(Step(pulls=[Pull("d", remote, tuple(blocks), first, tokens)]))
        return self.wait()

    def wait(self) -> set[int]:
        received: set[str] = set()
        failed: set[int] = set()

        def done() -> bool:
            nonlocal received, failed
            _, more, wrong = self.half.take_done()
            received |= more
            failed |= wrong
            return bool(received)

        assert settle(done)
        assert received == {"d"}
        return failed

    def freed(self, name: str) -> bool:
        """Whether the blocks of a request need not be kept any more, sooner or later."""
        return settle(lambda: name in self.half.take_done()[0])


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(*args: Any, **kwargs: Any) -> Worker:
        made.append(Worker(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.half.close()


def snapshot(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.kv.items()}


@pytest.mark.parametrize("verify", [False, True])
def test_pages_arrive_where_they_belong(worker: Callable[..., Worker], verify: bool) -> None:
    p, d = worker(8, 1), worker(20, 2, verify=verify)
    expected = snapshot(d)
    assert not d.pull(p.grant(1, [5, 2, 7], 90), [11, 3, 19], 32, 90)
    for name, tensor in expected.items():
        # The first block was there already.
        tensor[3], tensor[19] = p.kv[name][2], p.kv[name][7]
        assert torch.equal(d.kv[name], tensor)
    assert p.freed("p1")


def test_both_pull_at_the_same_time(worker: Callable[..., Worker]) -> None:
    a, b = worker(8, 1), worker(8, 2)
    expected = {name: (a.kv[name][1].clone(), b.kv[name][2].clone()) for name in a.kv}
    of_a, of_b = a.grant(1, [1], 32), b.grant(1, [2], 32)
    a.half.step(Step(pulls=[Pull("d", of_b, (3,), 0, 32)]))
    b.half.step(Step(pulls=[Pull("d", of_a, (4,), 0, 32)]))
    assert not a.wait()
    assert not b.wait()
    for name, (from_a, from_b) in expected.items():
        assert torch.equal(a.kv[name][3], from_b)
        assert torch.equal(b.kv[name][4], from_a)


def test_many_at_the_same_time(worker: Callable[..., Worker]) -> None:
    producers, d = [worker(32, seed) for seed in (1, 2)], worker(64, 3)
    pulls = [
        Pull(f"d{at}", producers[at % 2].grant(at + 1, [at], 32), (at + 1,), 0, 32)
        for at in range(30)
    ]
    d.half.step(Step(pulls=pulls))
    received: set[str] = set()

    def all_done() -> bool:
        _, more, failed = d.half.take_done()
        assert not failed
        received.update(more)
        return len(received) == len(pulls)

    assert settle(all_done)
    for at in range(30):
        for name, tensor in d.kv.items():
            assert torch.equal(tensor[at + 1], producers[at % 2].kv[name][at])


def shared(workers: list[Worker], number: int, blocks: list[int], tokens: int) -> RemoteBlocks:
    """What an engine of several workers keeps."""
    told = [each.grant(number, blocks, tokens) for each in workers]
    return msgspec.structs.replace(
        told[0], remote_peers=tuple(peer for each in told for peer in each.remote_peers)
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
    remote = p.grant(1, [5, 2], 64)
    assert not consumers[0].pull(remote, [1, 3], 0, 64)
    assert not p.half.take_done()[0], "the other has not read yet"
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
    d.half.step(Step(pulls=[Pull("d", p.grant(1, [1], 32), awaited=False)]))
    assert p.freed("p1")
    assert d.half.take_done() == (set(), set(), set()), "the engine does not wait for it"
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in expected.items())


def test_a_lease_that_has_ended(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1, lease_s=1.0), worker(8, 2)
    remote = p.grant(1, [1, 2], 64)
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
    assert d.pull(p.grant(1, [1, 2], 64), [3, 4], 32, 64) == {4}


@pytest.mark.parametrize("field", ["vllm", "model", "config", "dtype", "kv_dtype", "kernel"])
def test_other_kv_is_refused(
    worker: Callable[..., Worker], field: str, caplog: pytest.LogCaptureFixture
) -> None:
    p = worker(8, 1)
    d = worker(8, 2, msgspec.structs.replace(FINGERPRINT, **{field: "other"}))
    expected = snapshot(d)
    with caplog.at_level(logging.WARNING):
        assert d.pull(p.grant(1, [1], 32), [3], 0, 32) == {3}
    assert f"{field} is 'other' here" in caplog.text
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in expected.items())
    assert p.freed("p1")


def test_the_producer_is_gone(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    linked, unlinked = p.grant(1, [1], 32), p.grant(2, [2], 32)
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
    d.half.step(Step(pulls=[Pull("d", p.grant(1, [1], 32), (3,), 0, 32)]))
    assert reached.wait(60)
    # As if its process had died.
    d.half._service.close()
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
        assert d.pull(p.grant(1, [1, 2], 64), [3, 4], 0, 64) == {3, 4}
    assert "differ in their checksums" in caplog.text
    assert p.freed("p1")


def test_questions_that_are_none(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    remote = p.grant(1, [1], 32)
    assert not d.pull(remote, [3], 0, 32)
    ask = d.half._service.datadist.ask
    peer = remote.remote_peers[0][0]
    rows = torch.tensor([0, 8]).numpy().tobytes()
    early = lease_number_now() + 10**9
    for payload in (
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Claim", "lease": "x", "readers": 1}),
        msgspec.msgpack.encode({"type": "Checksums", "lease": early, "group": 0, "rows": rows}),
        msgspec.msgpack.encode({"type": "Checksums", "lease": early, "group": 5, "rows": rows}),
        msgspec.msgpack.encode({"type": "Checksums", "lease": early, "group": 0, "rows": b"123"}),
    ):
        with pytest.raises(ValueError, match=r"no question|no such rows|out of range"):
            ask(peer, payload)
    assert not d.pull(p.grant(10, [2], 32), [4], 0, 32)


@pytest.mark.parametrize(
    "extra",
    [
        {"lease": 5},
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

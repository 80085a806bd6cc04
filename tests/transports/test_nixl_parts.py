# SPDX-License-Identifier: Apache-2.0
"""What of the nixl transport can be looked at without NIXL."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from llm_datadist_torch import LLMException, LLMParamError, LLMRole, LLMStatusCode
from llm_datadist_torch.cli import doctor
from llm_datadist_torch.transports.base import HOST_DEVICE, MemoryKind, MemorySpan
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.transports.nixl import NixlTransport, engine
from llm_datadist_torch.transports.nixl import port as port_module
from llm_datadist_torch.transports.nixl.messages import Expect, Stop, runs_in
from llm_datadist_torch.transports.nixl.port import CHUNK_BYTES, CHUNK_RUNS, Port, _requests
from llm_datadist_torch.transports.nixl.serving import MAX_JOBS, Serving
from llm_datadist_torch.transports.nixl.spans import Spans
from llm_datadist_torch.values.config import EngineConfig

CONFIG = EngineConfig(LLMRole.MIX)


def span(address: int, nbytes: int) -> MemorySpan:
    return MemorySpan(address, nbytes, HOST_DEVICE)


def test_the_largest_spans_are_used():
    spans = Spans()
    for each in (span(100, 10), span(100, 50), span(120, 10), span(200, 10), span(200, 10)):
        spans.add(each)
    assert spans.of(torch.tensor([125, 205]), 5) == [span(100, 50), span(200, 10)]
    assert spans.of(torch.tensor([145]), 5) == [span(100, 50)]
    for addrs, nbytes in (([99], 1), ([149], 2), ([150], 1), ([205, 210], 1), ([-1], 1)):
        with pytest.raises(LLMParamError, match="not registered"):
            spans.of(torch.tensor(addrs), nbytes)
    assert spans.remove(span(100, 50))
    assert spans.of(torch.tensor([100]), 10) == [span(100, 10)]
    assert not spans.remove(span(200, 10))
    assert spans.of(torch.tensor([200]), 10) == [span(200, 10)]
    assert spans.remove(span(200, 10))
    assert not spans.remove(span(200, 10))
    with pytest.raises(LLMParamError, match="not registered"):
        spans.of(torch.tensor([200]), 10)


def test_thousands_of_spans_that_come_and_go():
    rng = random.Random(5)
    spans, there = Spans(), set()
    for _ in range(3000):
        at = 100 * rng.randrange(1000)
        if at in there and rng.random() < 0.4:
            assert spans.remove(span(at, 50))
            there.remove(at)
        elif at not in there:
            spans.add(span(at, 50))
            there.add(at)
    some = sorted(rng.sample(sorted(there), 50))
    assert spans.of(torch.tensor(some), 50) == [span(at, 50) for at in some]
    for at in range(0, 100_000, 100):
        if at in there:
            assert spans.of(torch.tensor([at + 40]), 10) == [span(at, 50)]
        else:
            with pytest.raises(LLMParamError, match="not registered"):
                spans.of(torch.tensor([at + 40]), 10)


def test_only_new_spans_cost_a_movement_something(monkeypatch):
    spans, found = Spans(), []
    monkeypatch.setattr(
        Spans, "_find_outer", lambda self, find=Spans._find_outer: found.append(1) or find(self)
    )
    spans.add(span(100, 50))
    for _ in range(5):
        assert spans.of(torch.tensor([100]), 50) == [span(100, 50)]
    assert len(found) == 1


def test_spans_that_overlap_in_part():
    spans = Spans()
    spans.add(span(100, 50))
    for other in (span(90, 11), span(149, 2)):
        with pytest.raises(LLMParamError, match="in part"):
            spans.add(other)
    for other in (span(90, 10), span(150, 10), span(80, 100), span(110, 10)):
        spans.add(other)


def overlap_in_part(one: MemorySpan, other: MemorySpan) -> bool:
    mine = set(range(one.address, one.address + one.nbytes))
    theirs = set(range(other.address, other.address + other.nbytes))
    return bool(mine & theirs) and not mine <= theirs and not theirs <= mine


def test_any_spans_are_checked_as_sets_of_bytes_would_be():
    numbers = random.Random(1)
    for _ in range(100):
        spans, there = Spans(), []
        for _ in range(40):
            if there and numbers.random() < 0.35:
                gone = there.pop(numbers.randrange(len(there)))
                assert spans.remove(gone) == (gone not in there)
                continue
            new = span(numbers.randrange(40), numbers.randrange(1, 20))
            if any(overlap_in_part(new, each) for each in there):
                with pytest.raises(LLMParamError, match="in part"):
                    spans.add(new)
            else:
                spans.add(new)
                there.append(new)


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [CHUNK_BYTES, 1, CHUNK_BYTES - 1, 2],
        [3 * CHUNK_BYTES + 5, 7, CHUNK_BYTES],
        [16] * (2 * CHUNK_RUNS + 3),
        [CHUNK_BYTES // 3] * 10,
    ],
)
def test_requests_cover_every_byte_once(sizes: list[int]):
    nbytes = torch.tensor(sizes)
    local = (nbytes.cumsum(0) - nbytes) * 2 + (1 << 40)
    remote = local.flip(0) + (1 << 42)
    moved = []
    for here, there in _requests(torch.stack((local, remote, nbytes))):
        assert 0 < len(here) <= CHUNK_RUNS
        assert int(here[:, 1].sum()) <= CHUNK_BYTES
        assert (here[:, 1] == there[:, 1]).all()
        moved += [
            (int(a), int(b), int(n)) for (a, n, _), (b, _, _) in zip(here, there, strict=True)
        ]
    at = 0
    for here, there, size in zip(local.tolist(), remote.tolist(), sizes, strict=True):
        done = 0
        while done < size:
            assert moved[at][:2] == (here + done, there + done)
            done += moved[at][2]
            at += 1
        assert done == size
    assert at == len(moved)


def test_runs_in_a_message():
    runs = torch.arange(6).view(3, 2)
    assert torch.equal(runs_in(runs.numpy().tobytes()), runs)
    for raw in (b"", b"x" * 23, b"x" * 25):
        with pytest.raises(msgspec.ValidationError):
            runs_in(raw)


def test_between_hosts_it_beats_the_relay():
    """And on one host, or in one process, `local` beats it."""
    transports = TransportSet(
        [LocalTransport(CONFIG, HOST_DEVICE), NixlTransport(CONFIG, HOST_DEVICE)], {}
    )
    me = HostIdentity.of_this_process()
    peers = {
        "nixl": msgspec.structs.replace(me, boot_id="another"),
        "local": msgspec.structs.replace(me, pid=1),
    }
    # Only the kernel proves that a peer is on this host.
    known = SimpleNamespace(pid=1, start_time=me.start_time)
    for expected, peer in peers.items():
        offer = msgspec.msgpack.encode(peer)
        channel = transports.connect(
            {"local": offer, "nixl": offer},
            SimpleNamespace(same_process_peer=None, process=known if expected == "local" else None),
        )
        choice = channel.choice(MemoryKind.HOST)
        assert choice.transport == expected
        if expected == "nixl":
            assert "between hosts" in str(choice)
        assert channel.choice(MemoryKind.DEVICE).transport == "local"  # its relay
        channel.close()


def test_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch):
    present: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.4.2")

    def reason() -> str | None:
        return NixlTransport.availability(CONFIG, HOST_DEVICE)

    assert "nixl-cu12 is not installed" in reason()
    present.add("nixl_cu13")
    assert "numpy" in reason()
    present.add("numpy")
    assert "nixl-cu13 1.4.2 is installed, 1.5.x is needed" in reason()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.5.1")
    assert reason() is None


def test_on_loopback_it_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_datadist_torch.transports.nixl.why_not_installed", lambda: None)

    def reason(host: str, transport: str | None = None) -> str | None:
        config = EngineConfig(LLMRole.MIX, listen=(host, 0), transport=transport)
        return NixlTransport.availability(config, HOST_DEVICE)

    for host in ("127.0.0.1", "::1"):
        assert "loopback" in str(reason(host))
        assert reason(host, "nixl") is None
    assert reason("10.0.0.1") is None


class SomeCache:
    """A leased cache of one stretch."""

    def __init__(self) -> None:
        self.addrs, self.extent, self.writable = torch.tensor([0]), 64, True
        self.leases = 0

    def check(self, addrs: torch.Tensor, nbytes: torch.Tensor) -> None:
        pass

    def acquire(self) -> None:
        self.leases += 1

    def end(self) -> None:
        self.leases -= 1


def test_a_peer_that_asks_for_everything_at_once(monkeypatch: pytest.MonkeyPatch):
    busy, go_on = threading.Event(), threading.Event()
    cache, answers = SomeCache(), []

    def slowly(self, said, cache, reply):
        busy.set()
        go_on.wait(30)
        cache.end()
        reply(b"")

    monkeypatch.setattr(Serving, "_expect", slowly)
    serving = Serving(Spans())
    serving.take(Expect(1), cache, answers.append)
    assert busy.wait(30)
    for number in range(MAX_JOBS):
        serving.take(Expect(2 + number), cache, answers.append)
    with pytest.raises(LLMException, match="no more than 64 may") as failure:
        serving.take(Expect(99), cache, answers.append)
    assert failure.value.status_code is LLMStatusCode.LLM_LINK_BUSY
    # To stop is always possible, and what was refused holds nothing.
    serving.stop(Stop(0, failed=False))
    assert cache.leases == 1 + MAX_JOBS
    go_on.set()
    serving.close()
    serving.join(30)
    assert (cache.leases, len(answers)) == (0, 1 + MAX_JOBS)


class SomeAgent:
    """Counts."""

    described = 0

    def __init__(self, *, receives: bool) -> None:
        pass

    def register(self, table) -> object:
        return object()

    def deregister(self, memory) -> None:
        pass

    def describe(self, table) -> bytes:
        SomeAgent.described += 1
        return b"%d" % SomeAgent.described

    def close(self) -> None:
        pass


def test_a_ticket_holds_until_its_memory_goes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(port_module, "Agent", SomeAgent)
    port, first, second = Port(receives=True), [span(0, 64)], [span(64, 64)]
    tickets = []

    def ticket(spans: list[MemorySpan]) -> None:
        port.register(spans)
        tickets.append(port.ticket(spans))

    for spans in (first, first, second, second):
        ticket(spans)
    assert tickets == [b"1", b"1", b"2", b"2"]
    port.drop(second[0])
    ticket(second)
    ticket(second)
    port.abandon()
    ticket(second)
    # Registered anew, because something overlaps it.
    port.register([span(64, 128)])
    ticket(second)
    assert tickets[4:] == [b"3", b"3", b"4", b"5"]


def test_where_rdma_providers_are_installed_it_is_said_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "_PROVIDERS", tmp_path)
    monkeypatch.delenv("UCX_MODULES", raising=False)
    assert engine.why_exit_crashes() == ""
    assert doctor._transport("nixl", "").state == "ok"
    (tmp_path / "mlx5.driver").write_text("driver mlx5\n")
    assert "UCX_MODULES=^ib" in engine.why_exit_crashes()
    finding = doctor._transport("nixl", "")
    assert (finding.state, "UCX_MODULES=^ib" in finding.remedy) == ("note", True)
    monkeypatch.setenv("UCX_MODULES", "^ib")
    assert engine.why_exit_crashes() == ""

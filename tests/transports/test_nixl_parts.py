# SPDX-License-Identifier: Apache-2.0
"""What of the nixl transport can be looked at without NIXL."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
from types import SimpleNamespace

import msgspec
import pytest
import torch

from llm_datadist_torch import LLMParamError, LLMRole
from llm_datadist_torch.config import EngineConfig
from llm_datadist_torch.transports.base import HOST_DEVICE, MemoryKind, MemorySpan
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.transports.nixl import NixlTransport
from llm_datadist_torch.transports.nixl.messages import columns_of, runs_of
from llm_datadist_torch.transports.nixl.port import CHUNK_BYTES, CHUNK_RUNS, _requests
from llm_datadist_torch.transports.nixl.spans import Spans

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
    for here, there in _requests((local, remote, nbytes)):
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
    columns = tuple(torch.arange(6).view(3, 2))
    assert torch.equal(torch.stack(columns_of(runs_of(columns))), torch.stack(columns))
    for raw in (b"", b"x" * 23, b"x" * 25):
        with pytest.raises(msgspec.ValidationError):
            columns_of(raw)


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
    for expected, peer in peers.items():
        offer = msgspec.msgpack.encode(peer)
        channel = transports.connect(
            {"local": offer, "nixl": offer}, SimpleNamespace(neighbour=None)
        )
        choice = channel.choice(MemoryKind.HOST)
        assert choice.transport == expected
        if expected == "nixl":
            assert "between hosts" in str(choice)
        assert channel.choice(MemoryKind.DEVICE).transport is None
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

# SPDX-License-Identifier: Apache-2.0
"""Which transport serves a link, per kind of memory, and what is registered where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_datadist_torch import LLMException, LLMFeatureNotEnabledError, LLMLinkError
from llm_datadist_torch.transports.base import (
    CacheVersion,
    Capabilities,
    Channel,
    Direction,
    Fit,
    MemoryKind,
    MemorySpan,
    Movement,
    PathUnavailable,
    RegionView,
    StaleCacheError,
    Transport,
    joined_spans,
    spans_in_storages,
)
from llm_datadist_torch.transports.choice import LinkChannel, TransportSet
from llm_datadist_torch.values.deadline import Deadline

HOST, DEVICE = MemoryKind.HOST, MemoryKind.DEVICE
CPU, META = torch.device("cpu"), torch.device("meta")


class StubChannel(Channel):
    def __init__(self, name: str, host: Fit, device: Fit) -> None:
        self.name = name
        self.fits = {HOST: host, DEVICE: device}
        self.forgotten: list[int] = []
        self.closed = False
        self.refuses = ""
        self.falls_to: Fit | None = None
        self.asked = 0

    def fit(self, kind):
        self.asked += 1
        return self.fits[kind]

    def move(self, movement, deadline):
        if self.refuses:
            raise PathUnavailable(self.refuses)
        if self.falls_to is not None:
            self.fits[movement.kind], self.falls_to = self.falls_to, None
            raise PathUnavailable("it got worse")
        return self.name

    def forget(self, region_id):
        self.forgotten.append(region_id)

    def close(self):
        self.closed = True


class StubTransport(Transport):
    name = "stub"
    preference = 1

    def __init__(self, name: str, *, host=True, device=True, registers=True, refuse=None) -> None:
        self.name = name  # type: ignore[misc]
        self.capabilities = Capabilities(host, device, True, True, True, True, registers)  # type: ignore[misc]
        self.refuse = refuse
        self.registered: list[MemorySpan] = []
        self.waits: list[Any] = []
        self.channel = StubChannel(name, Fit.good("stub"), Fit.good("stub"))

    @classmethod
    def availability(cls, config, device):
        return None

    def offer(self):
        return self.name.encode()

    def connect(self, offer, relay):
        if offer == b"bad":
            raise LLMFeatureNotEnabledError("bad offer")
        return self.channel

    def register(self, span):
        if span == self.refuse:
            raise LLMException("refused")
        self.registered.append(span)

    def unregister(self, span):
        self.registered.remove(span)

    def wait_closed(self, spans, deadline):
        self.waits.append((list(spans), list(self.registered), deadline))

    def close(self):
        pass


def movement(local=CPU, remote="cpu"):
    address, runs = torch.tensor([4096]), torch.tensor([[0, 0, 8]])
    return Movement(
        Direction.READ, address, address, runs, None, 1, local_device=local, remote_device=remote
    )


NO, LAST, GOOD = Fit.none("no way"), Fit.last_resort("slowly"), Fit.good("well")


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ((GOOD, NO), (GOOD, GOOD), ("a", "b")),  # `local` for host memory, `hixl` for the rest
        ((GOOD, GOOD), (GOOD, GOOD), ("a", "a")),  # one process: the preferred one does both
        ((LAST, NO), (GOOD, GOOD), ("b", "b")),  # another host: not by the relay if there is better
        ((LAST, NO), (NO, GOOD), ("a", "b")),
        ((NO, NO), (LAST, LAST), ("b", "b")),
    ],
)
def test_the_best_channel_serves(first, second, taken):
    channel = LinkChannel({"a": StubChannel("a", *first), "b": StubChannel("b", *second)})
    assert tuple(choice.transport for choice in channel.choices) == taken
    deadline = Deadline.after_ms(1000)
    assert channel.move(movement(), deadline) == taken[0]
    for local, remote in ((META, "cpu"), (CPU, "npu:0"), (META, "npu:0")):
        assert channel.move(movement(local, remote), deadline) == taken[1]


def test_a_channel_that_gets_worse_is_left():
    first, second = StubChannel("a", GOOD, NO), StubChannel("b", GOOD, NO)
    channel = LinkChannel({"a": first, "b": second})
    assert channel.move(movement(), Deadline.after_ms(1000)) == "a"
    first.falls_to = LAST
    assert channel.move(movement(), Deadline.after_ms(1000)) == "b"
    asked = first.asked
    assert channel.move(movement(), Deadline.after_ms(1000)) == "b"
    assert first.asked == asked  # the choice stands until a channel says that it can't serve


def test_a_channel_that_gets_worse_and_is_still_the_best():
    first, second = StubChannel("a", GOOD, NO), StubChannel("b", NO, NO)
    channel = LinkChannel({"a": first, "b": second})
    first.falls_to = LAST
    assert channel.move(movement(), Deadline.after_ms(1000)) == "a"


def test_a_channel_that_does_not_take_it_is_passed_over():
    first, second = StubChannel("a", GOOD, NO), StubChannel("b", LAST, NO)
    channel = LinkChannel({"a": first, "b": second})
    first.refuses = "not by addresses"
    assert channel.move(movement(), Deadline.after_ms(1000)) == "b"
    second.refuses = "never"
    with pytest.raises(LLMFeatureNotEnabledError, match="a: not by addresses; b: never"):
        channel.move(movement(), Deadline.after_ms(1000))


class Patient(StubChannel):
    """Serves after a while what it can't serve at once."""

    def move_at_last(self, movement, deadline):
        return f"{self.name}, at last"


def test_a_channel_that_must_wait_is_waited_for_where_nothing_else_serves():
    first, second = StubChannel("a", LAST, NO), Patient("b", GOOD, NO)
    channel = LinkChannel({"a": first, "b": second})
    second.refuses = "not yet"
    assert channel.move(movement(), Deadline.after_ms(1000)) == "a"
    first.refuses = "never"
    assert channel.move(movement(), Deadline.after_ms(1000)) == "b, at last"
    second.refuses = ""
    assert channel.move(movement(), Deadline.after_ms(1000)) == "b"


VERSION = CacheVersion(RegionView(1, 4096, 64, 3, 4, 5), 0, lookup=7, memory=8)


class Counters(StubChannel):
    """Moves without looking at versions, and shows the counters one after the other."""

    def __init__(self, *shown):
        super().__init__("a", GOOD, GOOD)
        self.shown = list(shown)

    def read_version(self, version):
        return self.shown.pop(0)


@pytest.mark.parametrize(
    ("lease_id", "version", "shown", "right"),
    [
        (0, VERSION, [(7, 8), (7, 8)], True),
        (0, VERSION, [(9, 8)], False),  # the key leads elsewhere
        (0, VERSION, [(7, 8), (7, 9)], False),  # freed while it was read
        (0, VERSION, [None], False),
        (0, None, [], False),
        (1, VERSION, [(7, 8)], True),
        (1, VERSION, [(9, 9)], False),
        (1, VERSION, [None], True),  # the lease is enough
        (1, None, [], True),
    ],
)
def test_the_link_checks_versions_for_channels_that_do_not(lease_id, version, shown, right):
    channel = LinkChannel({"a": Counters(*shown)})
    address, runs = torch.tensor([4096]), torch.tensor([[0, 0, 8]])
    read = Movement(Direction.READ, address, address, runs, None, lease_id, version=version)
    if right:
        assert channel.move(read, Deadline.after_ms(1000)) == "a"
    else:
        with pytest.raises(StaleCacheError):
            channel.move(read, Deadline.after_ms(1000))


def test_none_serves():
    channel = LinkChannel({"a": StubChannel("a", GOOD, Fit.none("host memory only"))})
    host, device = channel.choices
    assert str(host) == "host memory by a (well)"
    assert (device.transport, device.reason) == (None, "a: host memory only")
    with pytest.raises(LLMFeatureNotEnabledError, match=r"meta and the.*npu:1: a: host memory o"):
        channel.move(movement(META, "npu:1"), Deadline.after_ms(1000))


def test_all_channels_forget_and_close():
    parts = [StubChannel(name, GOOD, GOOD) for name in "ab"]
    channel = LinkChannel({part.name: part for part in parts})
    channel.forget(7)
    channel.close()
    assert [(part.forgotten, part.closed) for part in parts] == [([7], True)] * 2


def test_only_transports_of_both_ends():
    ours = TransportSet([StubTransport("a"), StubTransport("b")], {"c": "not installed"})
    assert ours.offers() == {"a": b"a", "b": b"b"}
    channel = ours.connect({"b": b"b", "c": b"c"}, None)
    assert [choice.transport for choice in channel.choices] == ["b", "b"]
    with pytest.raises(LLMLinkError, match=r"one has \['a', 'b'\], the other \['c'\]; c is not u"):
        ours.connect({"c": b"c"}, None)


def test_a_bad_offer_leaves_no_channel_open():
    first, second = StubTransport("a"), StubTransport("b")
    with pytest.raises(LLMException, match="bad offer"):
        TransportSet([first, second], {}).connect({"a": b"a", "b": b"bad"}, None)
    assert first.channel.closed


SPANS = [MemorySpan(at, 8, device) for at, device in ((0, CPU), (8, META), (16, CPU))]


def test_registered_where_it_is_wanted():
    both, host = StubTransport("both"), StubTransport("host", device=False)
    device, none = StubTransport("device", host=False), StubTransport("none", registers=False)
    transports = TransportSet([both, host, device, none], {})
    transports.register(SPANS)
    assert both.registered == SPANS
    assert host.registered == [SPANS[0], SPANS[2]]
    assert device.registered == [SPANS[1]]
    assert none.registered == []
    deadline = Deadline.after_ms(100)
    transports.unregister(SPANS, deadline)
    assert both.registered == host.registered == device.registered == []
    # Once for all of them, and by the caller's deadline.
    assert both.waits == [(SPANS, [], deadline)]


def test_memory_that_is_kept_is_not_waited_for():
    transport = StubTransport("one")
    transports = TransportSet([transport], {})
    transports.register(SPANS)
    transports.retire(SPANS, object())
    assert transport.registered == []
    assert transport.waits == []


def test_registration_is_all_or_nothing():
    first, second = StubTransport("a"), StubTransport("b", refuse=SPANS[2])
    with pytest.raises(LLMException, match="refused"):
        TransportSet([first, second], {}).register(SPANS)
    assert first.registered == second.registered == []


def test_host_memory_that_an_engine_refuses_is_left_to_others(caplog):
    engine, plain = (
        StubTransport("engine", refuse=SPANS[0]),
        StubTransport("plain", registers=False),
    )
    transports = TransportSet([engine, plain], {})
    transports.register(SPANS[:2])
    assert engine.registered == [SPANS[1]]
    assert "peers can't reach it by engine: refused" in caplog.text
    engine.refuse = SPANS[1]
    with pytest.raises(LLMException, match="refused"):
        transports.register([SPANS[1]])


def test_spans_know_the_storages_that_they_lie_in():
    spans = [MemorySpan(100, 50, CPU), MemorySpan(150, 51, CPU), MemorySpan(400, 8, CPU)]
    assert spans_in_storages(spans, [(400, 8), (100, 100), (100, 100)]) == [
        MemorySpan(100, 50, CPU, (100, 100)),
        MemorySpan(150, 51, CPU),
        MemorySpan(400, 8, CPU, (400, 8)),
    ]
    assert spans_in_storages(spans, []) == spans


def test_spans_of_tensors():
    assert joined_spans([300, 100, 200], 50, CPU) == [
        MemorySpan(100, 50, CPU),
        MemorySpan(200, 50, CPU),
        MemorySpan(300, 50, CPU),
    ]
    # Views whose rows lie between each other are one stretch of memory to an engine.
    assert joined_spans([100, 110, 200], 50, CPU) == [
        MemorySpan(100, 60, CPU),
        MemorySpan(200, 50, CPU),
    ]

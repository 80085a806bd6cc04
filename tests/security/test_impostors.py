# SPDX-License-Identifier: Apache-2.0
"""Peers that say they are somebody else: what they say of memory is not believed.

The impostor speaks the protocol in a thread of its own, so that it could not be found out by its
process; it is not an instance, which is what counts.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.net.process import start_time
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import CacheView, Envelope, encode
from llm_datadist_torch.transports.base import RegionView
from llm_datadist_torch.transports.local.host import HostIdentity
from tests.peers import Peer, Ref, Service, eventually
from tests.wire import Listener, Speaker

ME, LIAR, OTHER = 1, 66, 2
KEY = BlocksCacheKey(LIAR, 0)
WILD = 0x10
"""An address that nothing is mapped at."""
ROWS, ROW_BYTES = 4, 64
SAID = b"\x2a" * ROW_BYTES
"""What the liar sends as the bytes of its cache."""


class Liar:
    """A peer that answers everything, and lies about who it is and where its cache lies."""

    def __init__(self, offer: bytes, view: dict[str, Any], epoch: str | None = None) -> None:
        self.epoch = epoch or uuid.uuid4().hex
        self.offer, self.view = offer, view
        self.asked: list[str] = []
        self.written: list[bytes] = []
        self._listener = Listener(self._serve)
        self.port = self._listener.port

    def _serve(self, speaker: Speaker) -> None:
        frame, *data = speaker.receive()
        envelope = messages.decode(frame)
        said = self.answer(envelope.body, data)
        if envelope.request_id:
            reply = encode(Envelope(envelope.request_id, True, said[0]))
            speaker.send(reply, *said[1:])

    def answer(self, body: Any, data: list[bytes]) -> list[Any]:
        self.asked.append(type(body).__name__)
        if isinstance(body, messages.Hello):
            return [messages.Welcome(LIAR, self.epoch, {"local": self.offer})]
        if isinstance(body, messages.Resolve):
            whole = CacheView(
                1, 1, 1, ROWS, ROW_BYTES, ROW_BYTES, True, 0, WILD.to_bytes(8, "little"), None,
                False, "cpu", None, False,
            )  # fmt: skip
            return [msgspec.structs.replace(whole, **self.view)]
        if isinstance(body, messages.ReadBytes):
            return [messages.Done(), SAID]
        if isinstance(body, messages.WriteBytes):
            self.written += data
            return [messages.Done()]
        return [messages.Done()]

    def close(self) -> None:
        self._listener.close()


@contextmanager
def liar(offer: HostIdentity, *, epoch: str | None = None, **view: Any) -> Iterator[Liar]:
    it = Liar(msgspec.msgpack.encode(offer), view, epoch)
    try:
        yield it
    finally:
        it.close()


def move(me: Service, operation: str, key: BlocksCacheKey, source: int, target: int) -> Any:
    return me.attempt(operation, key, Ref("mine"), [source], [target], tensor_num_per_layer=1)


@pytest.fixture
def me(here: Service) -> Service:
    here.start(ME)
    here.allocate("mine", 1, ROWS, ROW_BYTES, paged=True)
    here.paint("mine", 7)
    return here


def thread_of_mine() -> HostIdentity:
    """The kernel takes the number of a thread where it wants that of a process."""
    number = next(
        int(task.name)
        for task in Path("/proc/self/task").iterdir()
        if int(task.name) != os.getpid()
    )
    return msgspec.structs.replace(
        HostIdentity.of_this_process(), pid=number, start_time=start_time(number)
    )


WHO: dict[str, Callable[[], HostIdentity]] = {
    "this process": HostIdentity.of_this_process,
    "a thread of this process": thread_of_mine,
    "an earlier one with its pid": lambda: msgspec.structs.replace(
        HostIdentity.of_this_process(), start_time=1
    ),
}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("unowned", [False, True])
def test_who_says_that_it_is_this_process_is_taken_for_far_away(
    me: Service, who: str, unowned: bool
) -> None:
    """None of the addresses that it gives are touched, not even good ones: bytes are relayed."""
    # Something of this process that a peer has no business with.
    secret = torch.full((ROWS, ROW_BYTES), 99, dtype=torch.uint8)
    for address in (WILD, secret.data_ptr()):
        addrs = address.to_bytes(8, "little")
        with liar(WHO[who](), addrs=addrs, unowned=unowned) as peer:
            assert me.link(LIAR, peer.port)[0] == "LLM_SUCCESS"
            (info,) = (info for info in me.dd.links() if info.peer == LIAR)
            assert "says that it is this process, and is not" in info.choices[0].reason
            assert move(me, "pull_blocks", KEY, 0, 1) is None
            assert bytes(me.held["mine"].cache.tensors[0][1].cpu().flatten().tolist()) == SAID
            assert move(me, "push_blocks", KEY, 2, 0) is None
            assert peer.written == [bytes([7]) * ROW_BYTES]
            assert me.unlink(LIAR, peer.port)[0] == "LLM_SUCCESS"
    assert secret.unique().tolist() == [99]


def test_a_region_of_this_process_is_not_mapped_for_a_peer(me: Service) -> None:
    """Its descriptor would open: it is ours."""
    entry = next(iter(me.instance.catalog._entries.values()))
    region = entry.region
    assert region is not None
    view = RegionView(
        region.region_id, region.address, region.nbytes, region.fd, region.inode, region.device
    )
    for who in WHO.values():
        with liar(who(), addrs=entry.addrs.numpy().tobytes(), region=view) as peer:
            assert me.link(LIAR, peer.port)[0] == "LLM_SUCCESS"
            assert move(me, "push_blocks", KEY, 0, 3) is None
            assert peer.written == [bytes([7]) * ROW_BYTES]
            me.unlink(LIAR, peer.port)


def test_a_thread_that_gets_the_pid_later(me: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was somebody else's when the link was made."""
    where = msgspec.structs.replace(HostIdentity.of_this_process(), pid=os.getppid())
    with liar(where) as peer:
        assert me.link(LIAR, peer.port)[0] == "LLM_SUCCESS"
        monkeypatch.setattr(HostIdentity, "is_here", True)
        assert move(me, "pull_blocks", KEY, 0, 1) is None
        assert "ReadBytes" in peer.asked


def test_a_pid_that_is_not_the_peers(here: Service, peers: Callable[[], Peer]) -> None:
    """The kernel says which process has connected: nobody else's memory is written to."""
    peer, victim = peers(), peers()
    peer.call("say_that_it_is", victim.pid)
    port = peer.call("start", OTHER)
    peer.call("register", "theirs", 1, ROWS, ROW_BYTES, paged=True, keys=BlocksCacheKey(OTHER, 0))
    here.start(ME)
    here.register("mine", 1, ROWS, ROW_BYTES, paged=True)
    here.paint("mine", 7)
    assert here.link(OTHER, port)[0] == "LLM_SUCCESS"
    assert move(here, "push_blocks", BlocksCacheKey(OTHER, 0), 0, 1) is None
    assert move(here, "pull_blocks", BlocksCacheKey(OTHER, 0), 1, 3) is None
    assert here.held["mine"].cache.tensors[0][3].unique().tolist() == [7]
    link = here.instance.links.find(OTHER)
    assert link.channel._channels["local"]._peer.pid == peer.pid


class Between:
    """Somebody between two instances of one process, who passes on what they say, changed."""

    def __init__(self, port: int, change: Callable[[Any], Any]) -> None:
        self.change = change
        self._far = Speaker.dial(port)
        self._listener = Listener(self._pass_on)
        self.port = self._listener.port
        self._back: threading.Thread | None = None

    def _pass_on(self, near: Speaker) -> None:
        if self._back is None:
            self._back = threading.Thread(target=self._pass_back, args=(near,), daemon=True)
            self._back.start()
        self._far.send(*near.receive())

    def _pass_back(self, near: Speaker) -> None:
        with suppress(OSError):
            while True:
                frame, *data = self._far.receive()
                envelope = messages.decode(frame)
                body = self.change(envelope.body)
                near.send(encode(Envelope(envelope.request_id, envelope.reply, body)), *data)

    def close(self) -> None:
        self._listener.close()
        self._far.close()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, ""),
    "an address": ({"addrs": WILD.to_bytes(8, "little")}, "LLM_PARAM_INVALID"),
    "the end": ({"rows": 1 << 40}, "LLM_PARAM_INVALID"),
    "the device": ({"device": "meta"}, "LLM_PARAM_INVALID"),
    "the lease": ({"lease_id": 77}, "LLM_KV_CACHE_NOT_EXIST"),
    "no lease": ({"lease_id": 0, "cache_id": 77}, "LLM_KV_CACHE_NOT_EXIST"),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("changed", CHANGES)
def test_between_two_instances_of_one_process(me: Service, changed: str, strided: bool) -> None:
    """They find each other, but what is changed on the way leads to nothing that was not leased."""
    fields, status = CHANGES[changed]
    other = Service()
    port = other.start(OTHER)
    other.register("theirs", 1, ROWS, ROW_BYTES, paged=True,
                   row_stride_bytes=96 if strided else ROW_BYTES,
                   keys=BlocksCacheKey(OTHER, 0))  # fmt: skip
    other.paint("theirs", 9)

    def change(body: Any) -> Any:
        return msgspec.structs.replace(body, **fields) if isinstance(body, CacheView) else body

    between = Between(port, change)
    try:
        assert me.link(OTHER, between.port)[0] == "LLM_SUCCESS"
        key = BlocksCacheKey(OTHER, 0)
        block = (1 << 40) - 1 if changed == "the end" else 1
        for operation in ("pull_blocks", "push_blocks"):
            there_first = operation == "pull_blocks"
            ids = (block, 1) if there_first else (1, block)
            failure = move(me, operation, key, *ids)
            assert (failure.status if failure else "") == status, failure
        pulled = me.held["mine"].cache.tensors[0][1].cpu().unique().tolist()
        assert pulled == [7 if status else 9]
        assert other.colours("theirs") == [9]
        # Whose lease was given another number on the way, can't give it back.
        me.unlink(OTHER, between.port, force=True)
        assert eventually(lambda: other.counters()["leases"] == me.counters()["leases"] == 0)
    finally:
        between.close()
        other.finish()


def test_another_instance_answers_a_dial(me: Service) -> None:
    """Who has been asked for 66 and answers as 2 does not become the link to 2."""
    other = Service()
    port = other.start(OTHER)
    try:
        assert me.link(OTHER, port)[0] == "LLM_SUCCESS"
        with liar(HostIdentity("elsewhere", 1, 1, 1)) as peer:
            peer.answer = lambda body, data: [  # type: ignore[method-assign]
                messages.Welcome(OTHER, peer.epoch, {"local": peer.offer})
            ]
            assert me.link(LIAR, peer.port)[1] == ["LLM_LINK_FAILED"]
        assert me.link_states() == {OTHER: "linked"}
        assert me.transports(OTHER)[0] == "local"
    finally:
        other.finish()


NONSENSE = {
    "no tensors": {"num_tensors": 0, "addrs": b""},
    "too few addresses": {"num_tensors": 2},
    "half an address": {"addrs": b"\x10\0\0"},
    "no rows": {"rows": 0},
    "rows that overlap": {"row_stride_bytes": 8},
    "rows backwards": {"row_stride_bytes": -ROW_BYTES},
    "more than there can be": {"rows": 1 << 60},
    "no number that fits": {"row_stride_bytes": 2**64 - 1},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_cache_that_can_not_be(me: Service, what: str) -> None:
    with liar(HostIdentity("elsewhere", 1, 1, 1), **NONSENSE[what]) as peer:
        assert me.link(LIAR, peer.port)[0] == "LLM_SUCCESS"
        for operation in ("pull_blocks", "push_blocks"):
            failure = move(me, operation, KEY, 0, 1)
            assert failure is not None
            assert failure.status == "LLM_FAILED", failure
        assert eventually(lambda: peer.asked.count("Release") == 2)
        assert me.link_states() == {LIAR: "linked"}

# SPDX-License-Identifier: Apache-2.0
"""What strangers send to a listening port disturbs neither the instance nor its links."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, Placement
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from llm_datadist_torch.transports.local.host import HostIdentity
from tests.peers import Ref, Service, eventually
from tests.wire import GREETING, Speaker, stranger


@pytest.fixture
def linked(
    here: Service, services: Callable[[], Service], caplog: pytest.LogCaptureFixture
) -> Iterator[tuple[Service, int]]:
    """Instance 1 listens and is linked with 2, which must still work at the end."""
    port = here.start(1)
    here.allocate("mine", 2, 4, 64, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("mine", 7)
    other = services()
    other.start(2)
    other.allocate("theirs", 2, 4, 64, paged=True)
    assert other.link(1, port)[0] == "LLM_SUCCESS"
    yield here, port
    assert other.attempt("pull_blocks", BlocksCacheKey(1, 0), Ref("theirs"), [0], [1]) is None
    assert other.span("theirs").rows == 4
    assert [tensor[1].cpu().unique().tolist() for tensor in other.held["theirs"].cache.tensors] == [
        [7],
        [7],
    ]
    assert here.link_states() == {2: "linked"}
    assert eventually(lambda: here.counters()["leases"] == 0)
    # Strangers are worth a warning; an error is one of ours.
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.message for record in errors if "answering Hello" not in record.message] == []


def raw(port: int, data: bytes, *, wait: float = 0.0) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(data)
            time.sleep(wait)
        except OSError:
            return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        random.Random(1).randbytes(100_000),
        GREETING[:5],
        GREETING,
        GREETING.replace(b"0", b"9"),
        # A message that promises more than it sends; one of 4 GiB.
        GREETING + b"\xff\0\0\0\xff\xff\xff\xffhalf",
        GREETING + b"\xff" * 8 + b"x" * 1000,
    ],
    ids=range(9),
)
def test_raw_bytes(linked: tuple[Service, int], data: bytes) -> None:
    _, port = linked
    for wait in (0.0, 0.05):
        raw(port, data, wait=wait)


def request(dealer: Speaker, body: messages.Message) -> messages.Message:
    return dealer.request(body)


def test_frames_that_are_no_messages(linked: tuple[Service, int]) -> None:
    _, port = linked
    rng = random.Random(2)
    whole = encode(Envelope(1, False, messages.Unlink()))
    junk = [whole[:at] for at in range(len(whole))]
    junk += [rng.randbytes(rng.randrange(200)) for _ in range(500)]
    junk += [
        msgspec.msgpack.encode([1, False, ["Hello", "wrong"]]),
        msgspec.msgpack.encode([2**64 - 1, True, ["Done"]]),
        b"\x93" * 100_000,
    ]
    for start in range(0, len(junk), 16):
        with stranger(port) as dealer, suppress(ConnectionError):
            for each in junk[start : start + 16]:
                dealer.send(each)
    with stranger(port) as dealer:
        for frames in ([b""], [b"", b""], [whole[:3]], [whole[:3], b"data"]):
            dealer.send(*frames)
        # So few are forgiven.
        assert isinstance(request(dealer, messages.Unlink()), messages.Refused)


def test_huge_messages(linked: tuple[Service, int]) -> None:
    _, port = linked
    for size in (messages.MAX_MESSAGE_BYTES + 1, messages.MAX_MESSAGE_BYTES // 4):
        # Of a peer that is not linked even a small part of that is too much.
        with stranger(port) as dealer:
            with suppress(ConnectionError):
                dealer.send(bytes(size))
            assert dealer.ended()
    with stranger(port) as dealer:
        dealer.send(bytes(messages.MAX_MESSAGE_BYTES // 16))
        assert isinstance(request(dealer, messages.Unlink()), messages.Refused)


def test_requests_without_a_link(linked: tuple[Service, int]) -> None:
    _, port = linked
    for body in (
        messages.Resolve("blocks", 0, 0, True, False),
        messages.ReadBytes(1, bytes(16)),
        messages.WriteBytes(1, bytes(16)),
        messages.Release(1, (0, 2)),
        messages.RegionFreed(1),
        messages.Done(),
    ):
        with stranger(port) as dealer:
            answer = request(dealer, body)
            while isinstance(answer, messages.Unlink):
                answer = messages.decode(dealer.receive()[0]).body
            assert isinstance(answer, messages.Refused), body


def hello(cluster_id: int, **changes: object) -> messages.Hello:
    offer = msgspec.msgpack.encode(HostIdentity("elsewhere", 1, 1, 1))
    whole = messages.Hello(cluster_id, 1, "life", False, {"local": offer})
    return msgspec.structs.replace(whole, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"expected_id": 5},
        {"remote_accessible": True},
        {"offers": {}},
        {"offers": {"other": b""}},
        {"offers": {"local": b"\xff\xff"}},
    ],
    ids=str,
)
def test_handshakes_that_are_refused(linked: tuple[Service, int], changes: dict) -> None:
    _, port = linked
    with stranger(port) as dealer:
        assert isinstance(request(dealer, hello(3, **changes)), messages.Refused)


def spans(*pairs: tuple[int, int]) -> bytes:
    return torch.tensor(pairs, dtype=torch.int64).numpy().tobytes()


@pytest.mark.parametrize("strided", [False, True])
def test_relayed_reads_stay_inside_the_cache(linked: tuple[Service, int], strided: bool) -> None:
    """A linked peer that lies about spans reaches no byte outside the rows of its lease."""
    here, port = linked
    here.register("rows", 2, 4, 64, paged=True, row_stride_bytes=96 if strided else 64,
                  keys=BlocksCacheKey(1, 5), placement=Placement.HOST)  # fmt: skip
    with stranger(port) as dealer:
        assert isinstance(request(dealer, hello(3)), messages.Welcome)
        view = request(dealer, messages.Resolve("blocks", 0, 5, True, False))
        assert isinstance(view, messages.CacheView)
        first, second = torch.frombuffer(bytearray(view.addrs), dtype=torch.int64).tolist()
        good = spans((first, 64), (second + 3 * view.row_stride_bytes, 64))
        assert isinstance(request(dealer, messages.ReadBytes(view.lease_id, good)), messages.Done)
        edges = [
            (first - 1, 1),
            (first - 1, 64),
            (first + 3 * view.row_stride_bytes, 65),
            (0, 8),
            (first, 0),
        ]
        edges += [(first, -1), (first, 2**63 - 1), (-(2**63), 8), (2**63 - 1, 8), (first, 2**62)]
        edges += [(second + view.row_stride_bytes * 4, 1)]
        if strided:
            edges += [(first, 65), (first + 64, 1), (first + 95, 2)]
        for bad in edges:
            for body in (
                messages.ReadBytes(view.lease_id, spans((first, 8), bad)),
                messages.WriteBytes(view.lease_id, spans(bad)),
            ):
                answer = request(dealer, body)
                assert isinstance(answer, messages.Refused), bad
        for body in (b"", b"x", bytes(17)):
            answer = request(dealer, messages.ReadBytes(view.lease_id, body))
            assert isinstance(answer, messages.Refused)
        answer = request(dealer, messages.ReadBytes(view.lease_id + 1, good))
        assert isinstance(answer, messages.Refused)
        for fetched in ((-5, 2**40), (3, 1)):
            dealer.send(encode(Envelope(0, False, messages.Release(view.lease_id, fetched))))
        assert isinstance(
            request(dealer, messages.ReadBytes(view.lease_id, good)), messages.Refused
        )
        dealer.send(encode(Envelope(0, False, messages.Unlink())))
        assert isinstance(request(dealer, messages.Unlink()), messages.Refused)
    here.drop("rows")


@pytest.mark.needs_npu
def test_device_memory_is_relayed_inside_the_cache_only(linked: tuple[Service, int]) -> None:
    _, port = linked
    with stranger(port) as dealer:
        assert isinstance(request(dealer, hello(3)), messages.Welcome)
        view = request(dealer, messages.Resolve("blocks", 0, 0, True, True))
        assert isinstance(view, messages.CacheView)
        first = int(torch.frombuffer(bytearray(view.addrs), dtype=torch.int64)[0])
        for start, nbytes in ((first - 1, 64), (first, 1 << 40), (0, 8), (first + 4 * 64, 1)):
            read = messages.ReadBytes(view.lease_id, spans((start, nbytes)))
            assert isinstance(request(dealer, read), messages.Refused)
        dealer.send(
            encode(Envelope(7, False, messages.ReadBytes(view.lease_id, spans((first, 64)))))
        )
        assert dealer.receive()[1] == bytes([7]) * 64
        dealer.send(encode(Envelope(0, False, messages.Unlink())))
        assert isinstance(request(dealer, messages.Unlink()), messages.Refused)


def test_flood(linked: tuple[Service, int]) -> None:
    """Somebody who never stops talking doesn't keep others from being served."""
    here, port = linked
    with stranger(port) as dealer:
        end = time.monotonic() + 1.0
        junk = encode(Envelope(0, False, messages.Done()))
        served = 0
        here.allocate("room", 2, 4, 64, paged=True)
        while time.monotonic() < end:
            for _ in range(50):
                dealer.send(junk)
            failure = here.attempt("pull_blocks", BlocksCacheKey(2, 9), Ref("room"), [0], [0])
            assert failure is not None
            assert failure.status == "LLM_KV_CACHE_NOT_EXIST"
            served += 1
        assert served

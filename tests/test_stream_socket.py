# SPDX-License-Identifier: Apache-2.0
"""``StreamSocket``: a thread takes its answer out of a socket that the I/O thread reads."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from llm_datadist_torch import _C
from llm_datadist_torch.net.framing import header
from llm_datadist_torch.serving.messages import Body, Done, Envelope, Note, encode
from tests.peers import eventually

pytestmark = pytest.mark.same_on_every_device
SECOND = 999_999_999
"""As long as a thread may wait, in nanoseconds."""


@dataclass
class Ends:
    ours: socket.socket
    theirs: socket.socket
    epoll: select.epoll
    stream: _C.StreamSocket

    def say(
        self,
        number: int,
        *,
        reply: bool = True,
        body: Body | None = None,
        data: bytes | None = None,
    ) -> bytes:
        """What the peer sends."""
        message = encode(Envelope(number, reply, body or Done()))
        self.theirs.sendall(header(message, data) + message + (data or b""))
        return message

    @property
    def unread(self) -> int:
        """Bytes that the I/O thread would read."""
        waits = bool(self.epoll.poll(0))
        try:
            count = len(self.ours.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            count = 0
        assert waits == (count > 0), "epoll does not wait for what is there"
        return count


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    epoll = select.epoll()
    epoll.register(ours, select.EPOLLIN)
    stream = _C.StreamSocket(epoll.fileno(), ours.fileno(), select.EPOLLIN)
    yield Ends(ours, theirs, epoll, stream)
    stream.close()
    for end in (epoll, ours, theirs):
        end.close()


@pytest.mark.parametrize(
    "number", [1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1]
)
def test_an_answer_is_taken(ends: Ends, number: int) -> None:
    sent = ends.say(number)
    assert ends.stream.take(number, SECOND) == sent
    assert ends.unread == 0


def test_the_next_one_is_left(ends: Ends) -> None:
    first, second = ends.say(3), ends.say(4, body=Note("local", b"x" * 100))
    assert ends.stream.take(3, SECOND) == first
    assert ends.unread == len(second) + 8


@pytest.mark.parametrize(
    "what", ["another's answer", "a request", "data", "too large", "a part", "no message"]
)
def test_the_rest_is_for_the_io_thread(ends: Ends, what: str) -> None:
    if what == "another's answer":
        ends.say(4)
        ends.say(5)
    elif what == "a request":
        ends.say(5, reply=False)
    elif what == "data":
        ends.say(5, data=b"bytes")
    elif what == "too large":
        ends.say(5, body=Note("local", b"x" * 20_000))
    elif what == "a part":
        message = encode(Envelope(5, True, Done()))
        ends.theirs.sendall((header(message, None) + message)[:-1])
    else:
        ends.theirs.sendall(b"\xff" * 100)
    before = ends.unread
    assert ends.stream.take(5, SECOND) is None
    assert ends.unread == before
    assert ends.stream.unconfirmed(0) == []


def test_it_waits_so_long(ends: Ends) -> None:
    assert ends.stream.take(1, 0) is None
    assert ends.stream.take(1, 1_000_000) is None
    timer = threading.Timer(0.05, lambda: ends.say(1))
    timer.start()
    assert ends.stream.take(1, SECOND) is not None
    timer.join()


@pytest.mark.parametrize("patience", [-1, 1_000_000_000])
def test_a_wait_that_is_none(ends: Ends, patience: int) -> None:
    with pytest.raises(ValueError, match="patience_ns"):
        ends.stream.take(1, patience)


def test_epoll_waits_for_what_was_set_meanwhile(ends: Ends) -> None:
    thread = threading.Thread(target=ends.stream.take, args=(1, SECOND))
    thread.start()
    while ends.stream.begin_reading():
        ends.stream.end_reading(at_boundary=True)
        time.sleep(0.001)
    ends.stream.watch(select.EPOLLIN | select.EPOLLOUT)
    ends.theirs.sendall(b"\xff")
    assert ends.epoll.poll(0.5) in (
        [(ends.ours.fileno(), select.EPOLLOUT)],
        [(ends.ours.fileno(), select.EPOLLIN | select.EPOLLOUT)],
    )
    thread.join()
    assert ends.epoll.poll(0.5) == [(ends.ours.fileno(), select.EPOLLIN | select.EPOLLOUT)]


def test_nobody_takes_while_it_is_read(ends: Ends) -> None:
    ends.say(1)
    assert ends.stream.begin_reading()
    assert ends.stream.take(1, 1_000_000) is None
    ends.stream.end_reading(at_boundary=False)
    assert ends.stream.take(1, 1_000_000) is None, "what is there may be the rest of a message"
    assert ends.stream.begin_reading()
    ends.stream.end_reading(at_boundary=True)
    assert ends.stream.take(1, SECOND) is not None


def test_the_io_thread_waits_to_read(ends: Ends) -> None:
    taken: list[bytes | None] = []
    thread = threading.Thread(target=lambda: taken.append(ends.stream.take(1, SECOND)))
    thread.start()
    while ends.stream.begin_reading():
        ends.stream.end_reading(at_boundary=True)
        time.sleep(0.001)
    timer = threading.Timer(0.05, lambda: ends.say(1))
    timer.start()
    ends.stream.wait_to_read()
    thread.join()
    timer.join()
    ends.stream.end_reading(at_boundary=True)
    assert taken[0] is not None


def test_what_is_not_confirmed_is_kept(ends: Ends) -> None:
    sent = [ends.say(number) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        ends.stream.take(number, SECOND)
    ends.stream.confirm(2)
    assert ends.stream.unconfirmed(3_600_000_000_000) == []
    assert ends.stream.unconfirmed(0) == [sent[0], sent[2]]
    assert ends.stream.unconfirmed(0) == []


def test_nothing_is_taken_once_it_is_closed(ends: Ends) -> None:
    thread = threading.Thread(target=ends.stream.take, args=(1, SECOND))
    thread.start()
    ends.stream.close()
    thread.join()
    ends.say(1)
    assert ends.stream.take(1, SECOND) is None
    ends.stream.close()


def test_a_peer_that_is_gone(ends: Ends) -> None:
    ends.theirs.close()
    assert ends.stream.take(1, SECOND) is None


def read_until(done: threading.Event, ends: Ends, read: bytearray) -> None:
    """The I/O thread: reads what nobody takes."""
    while not done.is_set():
        for _ in ends.epoll.poll(0.01):
            if not ends.stream.begin_reading():
                ends.stream.wait_to_read()
            with contextlib.suppress(BlockingIOError):
                read.extend(ends.ours.recv(1 << 16, socket.MSG_DONTWAIT))
            ends.stream.end_reading(at_boundary=True)


def take_all(ends: Ends, numbers: range, taken: dict[int, bytes]) -> None:
    for number in numbers:
        message = ends.stream.take(number, 2_000_000)
        if message is not None:
            taken[number] = message
            ends.stream.confirm(number)


def test_many_threads_take_their_own_answers(ends: Ends) -> None:
    taken: dict[int, bytes] = {}
    read, done, count = bytearray(), threading.Event(), 400
    reader = threading.Thread(target=read_until, args=(done, ends, read))
    threads = [
        threading.Thread(target=take_all, args=(ends, range(i, count, 4), taken)) for i in range(4)
    ]
    for thread in (reader, *threads):
        thread.start()
    sent = {number: ends.say(number) for number in range(count)}
    for thread in threads:
        thread.join()
    nbytes = {number: len(message) + 8 for number, message in sent.items()}
    assert eventually(lambda: sum(nbytes[n] for n in taken) + len(read) == sum(nbytes.values()))
    done.set()
    reader.join()
    assert all(sent[number] == message for number, message in taken.items())
    assert ends.stream.unconfirmed(0) == []

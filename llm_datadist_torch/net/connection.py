# SPDX-License-Identifier: Apache-2.0
"""One connection to a peer: a stream socket, what waits to be sent on it, and how it opens."""

from __future__ import annotations

import array
import collections
import ctypes
import errno
import itertools
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeAlias

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.net.addresses import SocketAddress
from llm_datadist_torch.net.framing import (
    HEADER_BYTES,
    Preamble,
    Sizes,
    Unreadable,
    header,
    parse_header,
)
from llm_datadist_torch.net.loop import BROKEN, READ, WRITE, Loop
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.net.tls import LinkKeys, Tls

logger = logging.getLogger("llm_datadist_torch")

Data: TypeAlias = "bytearray | memoryview"
"""Bytes that came with a message; the receiver owns them and may write to them."""

READ_BYTES = 1 << 16
_READS = 16
"""Times that one connection is read before the others get their turn."""
_LARGE = 1 << 16
"""A message of a linked peer that has more bytes is received into memory of its own."""
MAX_STRANGER_MESSAGE = 1 << 20
"""Bytes of one message before there is a link."""

_PAUSE_BYTES, _RESUME_BYTES = 16 << 20, 8 << 20
"""Of unsent answers: no more requests of a peer are read while it does not read its answers."""
_MOST_BYTES = 256 << 20
"""Of unsent messages: a connection that has more is ended."""
_RESET = struct.pack("ii", 1, 0)
_GATHER = 16
"""Parts that one system call sends."""
_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT

KEEPALIVE_S = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 3, socket.TCP_KEEPCNT: 5}
"""A host that has vanished is noticed by its silence after 20 s; no process has to do anything."""
UNACKNOWLEDGED_MS = 20_000
"""The same where something was sent that the other host has not acknowledged."""

# Calls that keep the GIL: they don't block, and a thread that gives the GIL away while another
# thread computes waits 5 ms for it. So an answer takes the GIL once, after epoll_wait.
_libc = ctypes.PyDLL(None, use_errno=True)
_recv, _send = _libc.recv, _libc.send
for _call in (_recv, _send):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _call.restype = ctypes.c_ssize_t


class ReadBuffer:
    """Where the I/O thread receives; one for all connections of an instance."""

    def __init__(self) -> None:
        self.memory = bytearray(READ_BYTES)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Closing(Protocol):
    """What is closed together with a connection."""

    def end(self, reason: str) -> None:
        """Close it. Idempotent."""


class Host(Protocol):
    """What a connection needs of the endpoint that it belongs to. All calls come from its loop."""

    loop: Loop
    buffer: ReadBuffer
    preamble: Preamble
    keys: LinkKeys | None

    def on_open(self, connection: Connection) -> None:
        """Both sides have the same version and the same secret."""

    def on_message(self, connection: Connection, message: memoryview, data: Data | None) -> None:
        """A message has come, in memory that is used again when this returns."""

    def on_end(self, connection: Connection, reason: str) -> None:
        """The connection has ended by itself."""

    def complain(self, text: str) -> None:
        """A stranger has done something wrong."""


class Connection:
    """The way to one peer.

    Thread safety: ``send`` may be called from any thread and does not block. ``answers`` may be
    used by all threads but the I/O thread, which everything else belongs to.

    A signal handler may raise in the middle of ``send``. So what was handed over to the socket is
    recorded by the same C call that hands it over, and is taken off the queue by what is recorded:
    an interrupted ``send`` never leaves half a message or sends one twice.

    Args:
        host: The endpoint.
        dialed: Whether we make the connection.

    Attributes:
        dialed: Whether we have made it.
        kept: Whether it is a link's, and not a stranger's.
        received: Bytes that have come.
        malformed: Messages that made no sense.
        answers: Where a thread takes the answer to its request by itself; None over TLS, and once
            the connection has ended.
        was_reset: Whether it has ended by a reset, as one does that is turned away.
        target: Where it is dialed.
        tries: How often it has been dialed again.
        opening: Whether the peer, which we have dialed, has not introduced itself yet.
        process: The peer's process, where it is on this host.
        not_local: Why it is no Unix socket; "" if it is one, or is still opening.
        proof: A Unix socket that it may move to; it is closed with the connection.
        nonces: What proves that a Unix socket has the same ends; see :mod:`net.unix`.
    """

    __slots__ = (
        "__weakref__", "_descriptors", "_expected", "_fd", "_filled", "_finishing", "_host",
        "_large", "_lock", "_mask", "_paused", "_queue", "_rest", "_sent", "_sizes", "_sock",
        "_stage", "_stream", "_tls", "answers", "dialed",
        "kept", "malformed", "nonces", "not_local", "opening", "process", "proof", "received",
        "target", "tries", "was_reset",
    )  # fmt: skip

    def __init__(self, host: Host, *, dialed: bool) -> None:
        self._host = host
        self.dialed = dialed
        self.kept = dialed
        self.received = 0
        self.malformed = 0
        self.was_reset = False
        self.tries = 0
        self.target: tuple[int, SocketAddress] = (socket.AF_UNSPEC, ("", 0))
        self.opening = dialed
        self.process: PeerProcess | None = None
        self.not_local = ""
        self.nonces = b"", b""
        self.proof: Closing | None = None
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._fd = -1
        self._stream: _C.StreamSocket | None = None
        self.answers: _C.StreamSocket | None = None
        self._stage: Callable[[memoryview | bytes], None] = self._on_preamble
        self._tls: Tls | None = None
        self._mask = 0
        self._paused = False
        # Of bytes to send: where each part ends in the stream, the part, and its descriptors.
        self._queue: collections.deque[tuple[int, bytes | memoryview, tuple[int, ...]]] = (
            collections.deque()
        )
        self._sent: list[int] = []
        self._rest = bytearray()
        self._large: memoryview | None = None
        self._filled = 0
        self._sizes = Sizes(0, -1)
        self._descriptors: collections.deque[int] = collections.deque()
        self._expected = 0
        self._finishing = False

    # -- from any thread --------------------------------------------------------------------------

    @property
    def remote_address(self) -> str | None:
        """Numeric address of the peer's end; None on a Unix socket, or when it has ended."""
        with self._lock, suppress(OSError):
            if self._sock is not None and self._sock.family != socket.AF_UNIX:
                return str(self._sock.getpeername()[0])
        return None

    def send(
        self,
        message: bytes,
        data: bytes | memoryview | None = None,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        """Send a message, or queue it where the socket is full. Does not block.

        On a connection that has ended it goes nowhere; the handler is told of the end.

        Args:
            message: The message.
            data: Bytes that come with it, sent as they are: the caller must not change them.
            descriptors: Duplicates of these arrive with it; on a Unix socket only.
        """
        part = header(message, data) + message
        if data or descriptors or self._tls is not None or not self._send_at_once(part):
            self._put([part, data] if data else [part], descriptors)

    def _send_at_once(self, part: bytes) -> bool:
        """Send a small message on an idle connection; False where it is for ``_put``."""
        try:
            with self._lock:
                if self._sock is None:
                    return True
                if self._queue:
                    return False
                self._sent = sent = list[int]()
                self._queue.append((len(part), part, ()))
                calls = map(_send, (self._fd,), (part,), (len(part),), (_FLAGS,))
                sent.extend(map(max, calls, (0,)))
                if sent[0] == len(part):
                    self._queue.clear()
                else:
                    self._flush()
        except BaseException as error:
            self._host.loop.submit(self.flush)
            if not isinstance(error, OSError):
                raise
        return True

    def _put(self, parts: Sequence[bytes | memoryview], descriptors: tuple[int, ...] = ()) -> None:
        try:
            with self._lock:
                if self._sock is None:
                    return
                # Whatever raises between two of these steps leaves a queue that makes sense.
                if self._tls is None:
                    ends = itertools.accumulate(map(len, parts), initial=self._end)
                    next(ends)
                    self._queue.extend(
                        list(zip(ends, parts, (descriptors, *((),) * len(parts)), strict=False))
                    )
                else:
                    self._tls.encrypt(b"".join(parts))
                self._flush()
                too_many = self._end - sum(self._sent) > _MOST_BYTES
        except BaseException:
            self._host.loop.submit(self.flush)
            raise
        if too_many:
            self._host.loop.submit(lambda: self.end("the peer does not read what is sent to it"))

    @property
    def _end(self) -> int:
        return self._queue[-1][0] if self._queue else sum(self._sent)

    def _flush(self) -> None:
        """Send what the socket takes. The lock is held."""
        if self._tls is not None and (pending := self._tls.to_send.pending):
            ends = (self._end + pending,)
            self._queue.extend(zip(ends, map(self._tls.to_send.read, (pending,)), ((),)))  # noqa: B905
        while self._queue and self._sock is not None:
            total = sum(self._sent)
            if len(self._sent) > _GATHER:
                self._sent = [total]
            while self._queue and self._queue[0][0] <= total:
                self._queue.popleft()
            if not self._queue:
                break
            try:
                self._send_some(self._sock, total)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                # The I/O thread learns of it from the socket itself, after what the peer has said.
                self._sent = [self._end]
        self._wait_for()

    def _send_some(self, sock: socket.socket, total: int) -> None:
        end, first, descriptors = self._queue[0]
        unsent: bytes | memoryview = first
        if (left := end - total) < len(first):
            unsent, descriptors = memoryview(first)[-left:], ()
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed(descriptors))]
            self._sent.extend(map(sock.sendmsg, ([unsent],), (ancillary,), (_FLAGS,)))
        elif len(self._queue) > 1:
            following = itertools.islice(self._queue, 1, _GATHER)
            plain = itertools.takewhile(lambda item: not item[2], following)
            buffers = [unsent, *(item[1] for item in plain)]
            self._sent.extend(map(sock.sendmsg, (buffers,), ((),), (_FLAGS,)))
        else:
            self._sent.extend(map(sock.send, (unsent,), (_FLAGS,)))

    def _wait_for(self) -> None:
        mask = (0 if self._paused else READ) | (WRITE if self._queue else 0)
        if mask != self._mask and self._stream is not None:
            self._stream.watch(mask)
            self._mask = mask

    def deliver_unconfirmed(self, age_s: float) -> bool:
        """Hand over the answers whose threads were interrupted so many seconds ago.

        Returns:
            Whether there are younger ones that have not been confirmed.
        """
        stream = self._stream
        if stream is None:
            return False
        for message in stream.unconfirmed(int(age_s * 1e9)):
            self._deliver(memoryview(message), None)
        return stream.waits

    # -- opening ----------------------------------------------------------------------------------

    def dial(self, family: int, address: SocketAddress) -> None:
        """Start to connect; what comes of it shows by the host's calls."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        set_tcp_options(sock)
        number = sock.connect_ex(address)
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            self.end(_unreachable(number))
            return
        self._attach(sock, WRITE, self._on_connected)

    def _on_connected(self, _events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.end(_unreachable(number))
            return
        self._host.loop.remove(sock.fileno())
        self.start(sock)

    def start(self, sock: socket.socket) -> None:
        """The socket is connected: say who we are, and hear who the peer is."""
        self._attach(sock, READ, self._on_events)
        self._put([self._host.preamble.encode()])

    def move(self, sock: socket.socket, process: PeerProcess) -> None:
        """Go on over a Unix socket that has the same ends, in place of TCP and TLS."""
        self.proof = None
        with self._lock:
            self._detach()
            self._tls = None
            self.process = process
            self._attach(sock, READ, self._on_events)
        if process.fileno() >= 0 and not process.is_this_one:
            self._host.loop.add(process.fileno(), READ, self._on_death)

    def suspend(self, proof: Closing) -> None:
        """Hear nothing while a Unix socket is tried: the peer closes this one when it has moved."""
        self.proof = proof
        if self._sock is not None:
            self._host.loop.remove(self._sock.fileno())

    def resume(self) -> None:
        """It does not move."""
        self.proof = None
        if self._sock is not None:
            self._host.loop.add(self._sock.fileno(), self._mask, self._on_events)

    def _attach(self, sock: socket.socket, mask: int, callback: Callable[[int], None]) -> None:
        self._sock, self._fd, self._mask = sock, sock.fileno(), mask
        self._host.loop.add(self._fd, mask, callback)
        self._stream = self.answers = self._host.loop.stream(self._fd, mask)

    def _detach(self) -> None:
        stream, self._stream, self.answers = self._stream, None, None
        if stream is not None:
            stream.close()
        sock, self._sock, self._fd = self._sock, None, -1
        if sock is not None:
            self._host.loop.remove(sock.fileno())
            sock.close()

    def _on_preamble(self, data: memoryview | bytes) -> None:
        self._rest += data
        ours = self._host.preamble
        with memoryview(self._rest) as view:
            parsed = Preamble.parse(view)
        if parsed is None:
            return
        theirs, size = parsed
        left = bytes(self._rest[size:])
        self._rest.clear()
        if theirs.version != ours.version:
            raise Unreadable(
                f"the peer runs version {theirs.version} of this library, this instance"
                f" {ours.version}; install the same version on both sides"
            )
        if theirs.secured != ours.secured:
            have = ("this instance", "the peer") if ours.secured else ("the peer", "this instance")
            raise Unreadable(f"{have[0]} has a link_secret, and {have[1]} has none")
        if self._host.keys is None:
            self._open(left)
            return
        self._tls = self._host.keys.protect(dialed=self.dialed)
        self.answers = None
        self._stage = self._on_handshake
        self._on_handshake(left)

    def _on_handshake(self, data: memoryview | bytes) -> None:
        if self._tls is None:
            return
        try:
            complete = self._tls.shake_hands(data)
        except Unreadable as error:
            # What TLS has to say about it goes out before the end.
            self.flush()
            raise Unreadable(f"the peer has another link_secret ({error})") from None
        self.flush()
        if complete:
            self._open(b"")

    def _open(self, left: bytes) -> None:
        self._stage = self._on_frames
        self._host.on_open(self)
        self._feed(left)

    # -- reading ----------------------------------------------------------------------------------

    def _on_events(self, events: int) -> None:
        if events == READ:
            self.read()
            return
        if events & WRITE:
            self.flush()
        if events & (READ | BROKEN):
            if events & BROKEN:
                # What the peer said before it went still counts.
                self._paused = False
            self.read()

    def _on_death(self, _events: int) -> None:
        """The peer's process has ended; a child of it may still keep the socket open."""
        while self._sock is not None and self.read():
            pass
        self.end("the peer's process has ended")

    def flush(self) -> None:
        """Send what the socket takes, and go on reading if there was too much to send."""
        with self._lock:
            self._flush()
            resume = self._paused and self._end - sum(self._sent) < _RESUME_BYTES
            if resume:
                self._paused = False
                self._wait_for()
        if resume:
            self._feed(b"")
        if self._finishing and not self._queue:
            self.close()

    def read(self) -> bool:
        """Read what has come, up to a limit; whether there may be more."""
        stream = self._stream
        if stream is None:
            return False
        if not stream.begin_reading():
            stream.wait_to_read()
        try:
            return self._read()
        finally:
            stream.end_reading(not self._rest and self._large is None)

    def _read(self) -> bool:
        for _ in range(_READS):
            if self._sock is None or self._paused:
                return False
            large = self._large if self._tls is None else None
            try:
                if large is not None:
                    # Without the GIL: this may be a large copy.
                    count = self._sock.recv_into(large[self._filled :])
                    full = count == len(large) - self._filled
                else:
                    count = self._receive(self._sock)
                    full = count == READ_BYTES
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                self.was_reset = error.errno == errno.ECONNRESET
                self.end(_why_ended(error))
                return False
            if count == 0:
                self.end(self._closed_by_peer())
                return False
            self.received += count
            if large is not None:
                self._grow(count)
            else:
                self._feed(self._host.buffer.view[:count])
            if not full:
                return False
        return True

    def _receive(self, sock: socket.socket) -> int:
        if self._expected:
            size = socket.CMSG_SPACE(self._expected * 4)
            count, ancillary, _, _ = sock.recvmsg_into([self._host.buffer.view], size)
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._descriptors.extend(unpacked(raw))
            return count
        count = _recv(self._fd, self._host.buffer.address, READ_BYTES, socket.MSG_DONTWAIT)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(count)

    def _feed(self, data: memoryview | bytes) -> None:
        try:
            if self._tls is not None and data and self._stage != self._on_handshake:
                data = self._tls.decrypt(data)
            self._stage(data)
        except Unreadable as error:
            if not self.dialed:
                self._host.complain(f"refused a connection: {error}")
            self.end(str(error))

    def _on_frames(self, data: memoryview | bytes | bytearray) -> None:
        if self._large is not None and data:
            room = min(len(data), len(self._large) - self._filled)
            self._large[self._filled : self._filled + room] = data[:room]
            self._grow(room)
            data = data[room:]
        if self._rest:
            self._rest += data
            data = self._rest
            self._rest = bytearray()
        view, at = memoryview(data), 0
        while len(view) - at >= HEADER_BYTES and self._hears:
            sizes = parse_header(view, at)
            if not self.kept and sizes.total > MAX_STRANGER_MESSAGE:
                raise Unreadable(f"a message of {sizes.total} bytes before there is a link")
            if at + sizes.total > len(view):
                if self.kept and sizes.total > _LARGE:
                    self._begin_large(sizes, view[at:])
                    return
                break
            body = at + HEADER_BYTES
            end = body + sizes.message
            at += sizes.total
            extra = bytearray(view[end:at]) if sizes.data >= 0 else None
            self._deliver(view[body:end], extra)
        if at < len(view):
            # The next read begins with these.
            self._rest = bytearray(view[at:])

    @property
    def _hears(self) -> bool:
        return self._sock is not None and not self._paused and not self._finishing

    def _begin_large(self, sizes: Sizes, begun: memoryview) -> None:
        # Not a bytearray, which is filled with zeros first.
        self._sizes, self._large = sizes, torch.empty(sizes.total, dtype=torch.uint8).numpy().data
        self._large[: len(begun)] = begun
        self._filled = len(begun)

    def _grow(self, count: int) -> None:
        self._filled += count
        if self._large is None or self._filled < len(self._large):
            return
        whole, self._large = self._large, None
        end = HEADER_BYTES + self._sizes.message
        self._deliver(whole[HEADER_BYTES:end], whole[end:] if self._sizes.data >= 0 else None)

    def _deliver(self, message: memoryview, data: Data | None) -> None:
        try:
            self._host.on_message(self, message, data)
        except Exception:
            logger.exception("error in the link thread")
        if self._queue and self._end - sum(self._sent) > _PAUSE_BYTES:
            with self._lock:
                self._paused = True
                self._wait_for()

    # -- descriptors of the peer ------------------------------------------------------------------

    def expect_descriptors(self, count: int) -> None:
        """Accept ``count`` more descriptors; the kernel closes unexpected ones."""
        self._expected += count

    def take_descriptor(self) -> int:
        """The next that has come, owned by the caller; -1 if none has."""
        self._expected = max(0, self._expected - 1)
        return self._descriptors.popleft() if self._descriptors else -1

    # -- the end ----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it has ended, or has never been there."""
        return self._sock is None

    def end(self, reason: str) -> None:
        """Close it, and tell the host, which still may take the process over."""
        self._shut()
        self._host.on_end(self, reason)
        self.take_process()

    def turn_away(self, reason: str) -> None:
        """End the connection by a reset; a peer that is dialing tries again."""
        if self._sock is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.end(reason)

    def start_again(self) -> None:
        """Forget what has been said: it is dialed once more."""
        self._rest, self._stage, self._tls = bytearray(), self._on_preamble, None
        self._sent, self.was_reset = [], False
        self.tries += 1

    def finish(self) -> None:
        """Hear nothing any more, and close it as soon as what is queued has been sent."""
        self._finishing = True
        self.flush()

    def linger(self, seconds: float) -> None:
        """Send what is queued, at most for so long. Blocks."""
        end = time.monotonic() + seconds
        while self._queue and self._sock is not None and (left := end - time.monotonic()) > 0:
            select.select([], [self._sock], [], left)
            self.flush()

    def close(self) -> None:
        """Close it. What has been sent arrives, what is queued does not. Idempotent."""
        self._shut()
        self.take_process()

    def take_process(self) -> PeerProcess | None:
        """Hand the peer's process to the caller; the connection watches it no longer."""
        process, self.process = self.process, None
        if process is not None:
            self._host.loop.remove(process.fileno())
        return process

    def _shut(self) -> None:
        with self._lock:
            self._detach()
            self._queue.clear()
        if self.proof is not None:
            self.proof.end("")
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def forget(self) -> None:
        """Close the descriptors only: in a forked child, where locks may be held for ever."""
        for owner in (self._sock, self.process):
            if owner is not None:
                with suppress(OSError):
                    owner.close()
        self._sock = None

    def _closed_by_peer(self) -> str:
        if self._stage == self._on_frames and not self.opening:
            return "the peer closed the connection"
        if self._host.keys is not None:
            return (
                "the peer ended the connection while it was being authenticated: it has another"
                " link_secret, or none, or does not speak this protocol"
            )
        return (
            "the peer ended the connection before it was up: it has a link_secret, and this"
            " instance has none; or it does not speak this protocol"
        )


def set_tcp_options(sock: socket.socket) -> None:
    """No delay of small messages, and the kernel's own watch on the other host."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE_S.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)


def _unreachable(number: int) -> str:
    if number == errno.EADDRNOTAVAIL:
        return (
            "no local port is left: too many connections were made a short while ago (see"
            " net.ipv4.ip_local_port_range), or this host has no address of that kind"
        )
    return f"connection refused or unreachable: {os.strerror(number)}"


def _why_ended(error: OSError) -> str:
    if error.errno == errno.ETIMEDOUT:
        return "the peer's host does not answer any more"
    if error.errno == errno.ECONNRESET:
        return "the peer closed the connection"
    return f"the connection broke: {error.strerror}"


def packed(descriptors: Sequence[int]) -> bytes:
    """The control message that carries descriptors."""
    return array.array("i", descriptors).tobytes()


def unpacked(raw: bytes) -> list[int]:
    """The descriptors in a control message, of which the last may be cut off."""
    numbers = array.array("i")
    numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
    return numbers.tolist()

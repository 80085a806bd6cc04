# SPDX-License-Identifier: Apache-2.0
"""The protocol, spoken by hand: strangers, liars and eavesdroppers for tests."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from llm_datadist_torch.net.framing import (
    HEADER_BYTES,
    WIRE_VERSION,
    Preamble,
    header,
    parse_header,
)
from llm_datadist_torch.net.tls import LinkKeys, Tls
from llm_datadist_torch.net.unix import Introduction
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from llm_datadist_torch.values.version import VERSION
from tests.security.attackers import GREETING

__all__ = ["GREETING", "Listener", "Speaker", "framed", "stranger"]


def framed(message: bytes, data: bytes | None = None) -> bytes:
    return header(message, data) + message + (data or b"")


class Speaker:
    """One end of a TCP connection, blocking; it never moves to a Unix socket."""

    def __init__(
        self, sock: socket.socket, *, dialed: bool, tls: Tls | None = None, greet: bool = True
    ) -> None:
        self.sock, self._tls, self._plain = sock, tls, b""
        if not greet:
            return
        secured = tls is not None
        sock.sendall(Preamble(secured, f"{VERSION}/{WIRE_VERSION}").encode())
        parsed, said = None, b""
        while parsed is None:
            said += self._some(1)
            parsed = Preamble.parse(memoryview(said))
        if tls is not None:
            complete = tls.shake_hands(b"")
            while not complete:
                self._flush_tls()
                complete = tls.shake_hands(self._some())
            self._flush_tls()
        if dialed:
            self.receive()
        else:
            self.send(msgspec.msgpack.encode(Introduction("", bytes(16), bytes(16))))

    @classmethod
    def dial(cls, port: int, keys: LinkKeys | None = None, timeout: float = 15.0) -> Speaker:
        sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        try:
            return cls(sock, dialed=True, tls=None if keys is None else keys.protect(dialed=True))
        except BaseException:
            sock.close()
            raise

    def send(self, message: bytes, data: bytes | None = None) -> None:
        self.send_raw(framed(message, data))

    def send_raw(self, raw: bytes) -> None:
        if self._tls is None:
            self.sock.sendall(raw)
        else:
            self._tls.encrypt(raw)
            self._flush_tls()

    def receive(self) -> list[bytes]:
        """The next message and, if it has some, its data; ConnectionError at the end."""
        sizes = parse_header(memoryview(self._exactly(HEADER_BYTES)), 0)
        message = self._exactly(sizes.message)
        return [message] if sizes.data < 0 else [message, self._exactly(sizes.data)]

    def request(self, body: messages.Message) -> messages.Message:
        self.send(encode(Envelope(7, False, body)))  # type: ignore[arg-type]
        return messages.decode(self.receive()[0]).body

    def poll(self, timeout_ms: int) -> bool:
        return bool(self._plain) or bool(select.select([self.sock], [], [], timeout_ms / 1000)[0])

    def ended(self) -> bool:
        """Whether the other side has closed it; what it has said is read first."""
        try:
            while self._some():
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self.sock.close()

    def _flush_tls(self) -> None:
        assert self._tls is not None
        self.sock.sendall(self._tls.to_send.read())

    def _some(self, most: int = 1 << 16) -> bytes:
        data = self.sock.recv(most)
        if not data:
            raise ConnectionError("the other side has closed it")
        return data

    def _exactly(self, count: int) -> bytes:
        while len(self._plain) < count:
            data = self._some()
            self._plain += data if self._tls is None else self._tls.decrypt(data)
        data, self._plain = self._plain[:count], self._plain[count:]
        return data


@contextmanager
def stranger(port: int, keys: LinkKeys | None = None) -> Iterator[Speaker]:
    speaker = Speaker.dial(port, keys)
    try:
        yield speaker
    finally:
        speaker.close()


class Listener:
    """Accepts connections, and serves each in a thread of its own until it ends."""

    def __init__(self, serve: Callable[[Speaker], None]) -> None:
        self._serve = serve
        self._server = socket.create_server(("127.0.0.1", 0))
        self._speakers: list[Speaker] = []
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            speaker = Speaker(sock, dialed=False)
            self._speakers.append(speaker)
            while True:
                self._serve(speaker)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for speaker in self._speakers:
            with suppress(OSError):
                speaker.sock.shutdown(socket.SHUT_RDWR)
            speaker.close()
        self._thread.join(5)

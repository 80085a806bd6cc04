# SPDX-License-Identifier: Apache-2.0
"""How a TCP connection moves to a Unix socket when both ends are on one host.

The listener tells every peer, over the connection that is there, the address of its Unix socket and
two nonces. A peer that reaches the address is on this host (and in this network namespace). Each
side proves by a nonce that it is the other end of the first connection, and sends a pidfd of its
own. Over the Unix socket the kernel says who the peer is, and descriptors can be sent.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import socket
from collections.abc import Callable

import msgspec

from llm_datadist_torch.net.connection import Connection, packed, unpacked
from llm_datadist_torch.net.loop import READ, Loop
from llm_datadist_torch.net.process import PeerProcess, own_pidfd

NONCE_BYTES = 16
_BACKLOG = 512
_PREFIX = "\0llm_datadist_torch."


class Introduction(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first message of the side that listens.

    Attributes:
        address: Of its Unix socket, in the abstract namespace; "" for none.
        asked: What the dialing side has to say on it.
        answer: What it hears then.
    """

    address: str
    asked: bytes
    answer: bytes


def introduce(listener: socket.socket | None) -> Introduction:
    """An introduction for one connection."""
    address = "" if listener is None else listener.getsockname().decode()
    return Introduction(address, secrets.token_bytes(NONCE_BYTES), secrets.token_bytes(NONCE_BYTES))


def listen() -> socket.socket | None:
    """A listening Unix socket under a random name; None where none can be had."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(_PREFIX + secrets.token_hex(16))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        return None
    return sock


class Proof:
    """A Unix socket on which the peer has still to prove that it is the other end of a connection.

    Thread safety: none; it belongs to the I/O thread.

    Args:
        loop: Where to wait.
        sock: The connected socket.
        on_nonce: Called with this, and with the nonce that has come (b"" if the peer has gone).
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, on_nonce: Callable[[Proof, bytes], None]
    ) -> None:
        self._loop, self._sock, self._on_nonce = loop, sock, on_nonce
        self._pidfd = -1
        sock.setblocking(False)
        loop.add(sock.fileno(), READ, self._on_events)

    def give(self, nonce: bytes) -> bool:
        """Say this, with a pidfd of this process; whether it could be sent."""
        pidfd = own_pidfd()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed([pidfd]))] if pidfd >= 0 else []
        try:
            return self._sock.sendmsg([nonce], rights) == len(nonce)
        except OSError:
            return False
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def accept(self, connection: Connection) -> None:
        """The nonce was right: the connection goes on over this socket."""
        self._loop.remove(self._sock.fileno())
        sock, pidfd, self._pidfd = self._sock, self._pidfd, -1
        connection.move(sock, PeerProcess.of_socket(sock, pidfd))

    def end(self, reason: str = "") -> None:  # noqa: ARG002
        """Close it. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove(self._sock.fileno())
            self._sock.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def turn_away(self, reason: str) -> None:
        """See :class:`~llm_datadist_torch.net.strangers.Stranger`."""
        self.end(reason)

    def _on_events(self, _events: int) -> None:
        try:
            nonce, rights, _, _ = self._sock.recvmsg(NONCE_BYTES, socket.CMSG_SPACE(4))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            nonce, rights = b"", []
        for level, kind, raw in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for self._pidfd in unpacked(raw)[:1]:
                    os.set_inheritable(self._pidfd, False)
        self._on_nonce(self, nonce)


def connect(
    loop: Loop, connection: Connection, introduction: Introduction, done: Callable[[], None]
) -> None:
    """Move a connection that we have dialed to the listener's Unix socket, if we reach it.

    Args:
        loop: Where to wait.
        connection: The connection.
        introduction: What the listener has said on it.
        done: Called when it has moved, or will not (``connection.not_local`` says why).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if not introduction.address.startswith(_PREFIX):
            raise OSError(errno.ENOTSUP, "the peer has no Unix socket")
        sock.connect(introduction.address)
    except OSError as error:
        sock.close()
        connection.not_local = (
            "the peer is on another host, or in another network namespace"
            if error.errno == errno.ECONNREFUSED
            else f"no Unix socket: {error.strerror}"
        )
        done()
        return

    def on_nonce(proof: Proof, nonce: bytes) -> None:
        if hmac.compare_digest(nonce, introduction.answer) and not connection.closed:
            proof.accept(connection)
        else:
            proof.end()
            connection.not_local = "the Unix socket that the peer names is not its own"
            connection.resume()
        done()

    proof = Proof(loop, sock, on_nonce)
    connection.suspend(proof)
    if not proof.give(introduction.asked):
        on_nonce(proof, b"")

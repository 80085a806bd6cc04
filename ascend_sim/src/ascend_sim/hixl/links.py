# SPDX-License-Identifier: Apache-2.0
"""Links to other engines, of one direction: this side reads and writes, the other answers."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Sequence

from ascend_sim.hixl import runtime, wire
from ascend_sim.hixl.memory import ENDED, Range, Ranges
from ascend_sim.hixl.server import close

logger = logging.getLogger("hixl")

_ANSWER_S = 5.0
"""How long a peer may take to tell its registered memory again."""


class Link:
    """A link to one peer, from connect to disconnect.

    It is lost when the peer has gone or the connection broke: it stays, and transfers on it fail,
    until it is disconnected.
    """

    def __init__(self, remote: str, connection: socket.socket, welcome: wire.Message) -> None:
        self.remote = remote
        self.closed = threading.Event()
        self.pid: int = welcome["pid"]
        self._start: int = welcome["start"]
        self._version_address: int = welcome["version_address"]
        self._connection = connection
        self._lost = False
        # Held while bytes move: `close` waits for it.
        self.moving = threading.Lock()
        # Held for one question and its answer.
        self._talking = threading.Lock()
        self._table = _table(welcome)

    @classmethod
    def dial(cls, remote: str, host: str, port: int, deadline: wire.Deadline) -> Link:
        """Connects.

        Raises:
            TimeoutError: the peer does not answer in time.
            OSError: nobody listens there, or it is not the engine that is meant.
        """
        connection = socket.create_connection((host, port), timeout=max(deadline.left(), 1e-3))
        try:
            wire.send(connection, {"hello": remote})
            welcome = wire.receive(connection, deadline)
            if "refused" in welcome:
                raise ConnectionRefusedError(welcome["refused"])
            link = cls(remote, connection, welcome)
            if runtime.start_time(link.pid) != link._start:
                raise ConnectionRefusedError(
                    f"process {link.pid} of engine {remote} cannot be seen from here: the "
                    "simulated engine reaches processes of one machine and one pid namespace only"
                )
        except BaseException:
            connection.close()
            raise
        return link

    @property
    def lost(self) -> bool:
        """Whether nothing can be done on it any more but to disconnect."""
        return self._lost or self._is_hung_up()

    def drop(self) -> None:
        """The connection breaks."""
        self._lost = True

    def close(self, deadline: wire.Deadline) -> bool:
        """Ends the link; when it returns True nothing is written through it any more."""
        if not self.moving.acquire(timeout=deadline.left()):
            return False
        self.closed.set()
        self.moving.release()
        close(self._connection)
        return True

    def ranges(self) -> Ranges | None:
        """What the peer has registered now, None if the link is lost."""
        if self.lost or runtime.start_time(self.pid) != self._start:
            return None
        # The version is read one-sidedly too: a peer whose program sleeps can be read and written.
        version = runtime.read_number(self.pid, self._version_address)
        known, ranges = self._table
        if version == known:
            return ranges
        if version is None or version == ENDED:
            return None
        try:
            self._table = _table(self._ask({}, wire.Deadline(_ANSWER_S)))
        except OSError:
            return None
        return self._table[1]

    def move(self, write: bool, pieces: Sequence[runtime.Piece]) -> bool:
        """Moves pieces, of addresses registered there; False if that is impossible."""
        ranges = self.ranges()
        if ranges is None:
            return False
        aliased = []
        for local, remote, length in pieces:
            alias = ranges.alias(remote, length)
            if alias is None:
                logger.error("%s: memory at %#x is no longer registered", self.remote, remote)
                return False
            aliased.append((local, alias, length))
        error = runtime.fault("hixl.step") or runtime.copy(self.pid, write, aliased)
        if error:
            logger.error("%s: moving bytes failed with error %d", self.remote, error)
        return error == 0

    def notify(self, name: str, text: str, deadline: wire.Deadline) -> bool:
        """Leaves a notify with the peer; False if too many are unread there.

        Raises:
            TimeoutError: the peer does not answer in time.
            OSError: the link is lost.
        """
        return bool(self._ask({"notify": [name, text]}, deadline)["kept"])

    def _is_hung_up(self) -> bool:
        if not self._talking.acquire(blocking=False):
            return False  # Whoever talks will see it.
        try:
            # A link brings nothing unasked: readable while nobody asks means that it has ended.
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True
        finally:
            self._talking.release()

    def _ask(self, question: wire.Message, deadline: wire.Deadline) -> wire.Message:
        with self._talking:
            try:
                if self._lost:
                    raise ConnectionError("the link is lost")
                self._connection.settimeout(max(deadline.left(), 1e-3))
                wire.send(self._connection, question)
                return wire.receive(self._connection, deadline)
            except OSError:
                # An answer that comes later must not be taken for that of another question.
                self._lost = True
                raise


def _table(message: wire.Message) -> tuple[int, Ranges]:
    return message["version"], Ranges(Range(*one) for one in message["ranges"])

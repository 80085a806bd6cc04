# SPDX-License-Identifier: Apache-2.0
"""All links of one engine: connect and disconnect, now or in the background, and the heartbeat."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ascend_sim.hixl import constants
from ascend_sim.hixl.constants import (
    ALREADY_CONNECTED,
    FAILED,
    NOT_CONNECTED,
    PARAM_INVALID,
    RESOURCE_EXHAUSTED,
    SUCCESS,
    TIMEOUT,
)
from ascend_sim.hixl.links import Link
from ascend_sim.hixl.options import Options, parse_engine
from ascend_sim.hixl.types import AsyncConnectStatus
from ascend_sim.hixl.wire import Deadline

logger = logging.getLogger("hixl")

HEARTBEAT_S = 10.0
"""How often AutoConnect looks for dead links."""


class Connections:
    """Links by the peer's name.

    Args:
        engine: the name of the engine that they start from.
        options: of that engine.
        forget: called with each link that has ended.
    """

    def __init__(self, engine: str, options: Options, forget: Callable[[Link], None]) -> None:
        self._engine = engine
        self._options = options
        self._forget = forget
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        # Events are set when the connecting is over, one way or the other.
        self._dialing: dict[str, threading.Event] = {}
        self._states: dict[str, AsyncConnectStatus] = {}
        self._ended = threading.Event()
        if options.auto_connect:
            threading.Thread(target=self._beat, name="hixl-heartbeat", daemon=True).start()

    def find(self, remote: str) -> Link | None:
        """The link to a peer, lost or not."""
        with self._lock:
            return self._links.get(remote)

    def reach(self, remote: str, deadline: Deadline) -> Link | int:
        """The link to a peer, made now if the engine connects by itself; or why there is none."""
        link = self.find(remote)
        if link is not None:
            return link
        if not self._options.auto_connect:
            return NOT_CONNECTED
        with self._lock:
            dialing = self._dialing.get(remote)
        if dialing is not None:
            dialing.wait(deadline.left())
        status = self.connect(remote, deadline)
        if status not in (SUCCESS, ALREADY_CONNECTED):
            return status
        return self.find(remote) or NOT_CONNECTED

    def connect(self, remote: str, deadline: Deadline) -> int:
        """Makes a link. Returns a status."""
        status = self._reserve(remote)
        return status or self._dial(remote, deadline, None)

    def connect_async(self, remote: str, deadline: Deadline) -> int:
        """Makes a link in the background. Returns a status."""
        status = self._reserve(remote)
        if status == SUCCESS:
            self._begin(remote, AsyncConnectStatus.CONNECT_PENDING, self._connect_later, deadline)
        return status

    def disconnect(self, remote: str, deadline: Deadline) -> int:
        """Ends a link; nothing is written through it any more. Returns a status."""
        link = self.find(remote)
        if link is None:
            return NOT_CONNECTED
        if not link.close(deadline):
            return TIMEOUT
        self._remove(link)
        return SUCCESS

    def disconnect_async(self, remote: str, deadline: Deadline) -> int:
        """Ends a link in the background. Returns a status."""
        if self.find(remote) is None:
            return NOT_CONNECTED
        self._begin(remote, AsyncConnectStatus.DISCONNECT_PENDING, self._disconnect_later, deadline)
        return SUCCESS

    def state(self, remote: str) -> AsyncConnectStatus:
        """How far a connect or disconnect is."""
        return self.states().get(remote, AsyncConnectStatus.NOT_CONNECT)

    def states(self) -> dict[str, AsyncConnectStatus]:
        """How far each is, of the peers that there was any for."""
        with self._lock:
            return dict.fromkeys(self._links, AsyncConnectStatus.CONNECTED) | self._states

    def end(self) -> None:
        """Ends all links."""
        self._ended.set()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            # No limit: a step that moves bytes is short.
            link.close(Deadline(threading.TIMEOUT_MAX))
            self._remove(link)

    def _reserve(self, remote: str) -> int:
        """Claims a peer's name for one connect."""
        try:
            _, port = parse_engine(remote)
        except ValueError as error:
            logger.error("connect: %s", error)
            return PARAM_INVALID
        if remote == self._engine or port == 0:
            logger.error("connect: %r cannot be connected to from %r", remote, self._engine)
            return PARAM_INVALID
        with self._lock:
            if remote in self._links or remote in self._dialing:
                return ALREADY_CONNECTED
            taken = len(self._links) + len(self._dialing)
            if taken >= constants.MAX_LINKS and not self._options.new_resources:
                logger.error("connect: %d links are the limit without LocalCommRes 1.3", taken)
                return RESOURCE_EXHAUSTED
            self._dialing[remote] = threading.Event()
        return SUCCESS

    def _dial(self, remote: str, deadline: Deadline, failed: AsyncConnectStatus | None) -> int:
        link = None
        status = SUCCESS
        try:
            link = Link.dial(remote, *parse_engine(remote), deadline)
        except TimeoutError as error:
            status = TIMEOUT
            logger.error("connect: %s: %s", remote, error)
        except OSError as error:
            status = FAILED
            logger.error("connect: %s: %s", remote, error)
        with self._lock:
            if link is not None and not self._ended.is_set():
                self._links[remote] = link
                link = None
            self._states.pop(remote, None)
            if status != SUCCESS and failed is not None:
                self._states[remote] = failed
            self._dialing.pop(remote).set()
        if link is not None:  # The engine was finalized meanwhile.
            link.close(deadline)
            return FAILED
        return status

    def _begin(
        self,
        remote: str,
        pending: AsyncConnectStatus,
        work: Callable[[str, Deadline], None],
        deadline: Deadline,
    ) -> None:
        self._set_state(remote, pending)
        threading.Thread(
            target=work, args=(remote, deadline), name="hixl-connect", daemon=True
        ).start()

    def _connect_later(self, remote: str, deadline: Deadline) -> None:
        self._set_state(remote, AsyncConnectStatus.CONNECTING)
        self._dial(remote, deadline, AsyncConnectStatus.CONNECT_FAILED)

    def _disconnect_later(self, remote: str, deadline: Deadline) -> None:
        self._set_state(remote, AsyncConnectStatus.DISCONNECTING)
        self.disconnect(remote, deadline)
        with self._lock:
            self._states.pop(remote, None)

    def _set_state(self, remote: str, state: AsyncConnectStatus) -> None:
        with self._lock:
            self._states[remote] = state

    def _remove(self, link: Link) -> None:
        with self._lock:
            if self._links.get(link.remote) is link:
                del self._links[link.remote]
        self._forget(link)

    def _beat(self) -> None:
        interval = HEARTBEAT_S
        while not self._ended.wait(interval):
            with self._lock:
                lost = [link for link in self._links.values() if link.lost]
            for link in lost:
                logger.warning("%s is gone: its link is dropped", link.remote)
                link.close(Deadline(threading.TIMEOUT_MAX))
                self._remove(link)

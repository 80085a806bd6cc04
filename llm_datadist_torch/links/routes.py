# SPDX-License-Identifier: Apache-2.0
"""What an endpoint and those who use it agree on: routes, who handles what comes, addresses."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple, Protocol

from llm_datadist_torch.links.messages import Envelope


class Route(NamedTuple):
    """The way to one peer.

    A socket that we connected (number > 0), or one connection of our listening socket (0).
    """

    socket: int
    identity: bytes


class Handler(Protocol):
    """Who gets what arrives. All calls come from the endpoint's thread and must not block."""

    def on_message(self, route: Route, envelope: Envelope, data: bytes | None) -> None:
        """A well-formed message."""

    def on_connected(self, route: Route) -> None:
        """A route that we connected is up, to something that speaks ZeroMQ."""

    def on_lost(self, route: Route, reason: str) -> None:
        """The connection is closed or never came about; ``route`` is dead."""

    def on_stuck(self, route: Route, reason: str) -> None:
        """The connection is there, but a message could not be sent."""


def tcp_address(host: str, port: int) -> str:
    """The ZeroMQ address of a host and port.

    Args:
        host: IPv4 text, also short as ``inet_aton`` has it, or IPv6 text.
        port: 0 for any that is free.

    Raises:
        ValueError: ``host`` is neither; names are not looked up.
    """
    text = str(port) if port else "*"
    try:
        return f"tcp://{socket.inet_ntoa(socket.inet_aton(host))}:{text}"
    except OSError:
        return f"tcp://[{ipaddress.IPv6Address(host)}]:{text}"

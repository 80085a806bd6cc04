# SPDX-License-Identifier: Apache-2.0
"""IP addresses of peers: parsing, and the warning about unprotected networks."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from typing import TypeAlias

logger = logging.getLogger("llm_datadist_torch")

SocketAddress: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"

_warned = threading.Event()


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, SocketAddress]:
    """The address family and socket address of a host and port.

    Args:
        host: IPv4 text, also short as ``inet_aton`` has it, or IPv6 text.
        port: 0 for any that is free.

    Raises:
        ValueError: ``host`` is neither; names are not looked up.
    """
    try:
        return socket.AF_INET, (socket.inet_ntoa(socket.inet_aton(host)), port)
    except OSError:
        address = ipaddress.IPv6Address(host)
    scope = socket.if_nametoindex(address.scope_id) if address.scope_id else 0
    return socket.AF_INET6, (str(address).partition("%")[0], port, 0, scope)


def address_towards(host: str, port: int) -> str:
    """The address of this host by which it reaches another one. Sends nothing.

    Raises:
        ValueError: ``host`` is not an address.
        OSError: There is no way there.
    """
    family, address = resolve(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address, given as IPv4 or IPv6 text."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_of_this_host(host: str) -> bool:
    """Whether this host has an address, given as IPv4 or IPv6 text."""
    family, address = resolve(host, 0)
    with socket.socket(family) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def warn_of_network(host: str) -> None:
    """Log, once per process, that a link without a secret leaves this host.

    Args:
        host: The address that is listened on or dialed, as :func:`resolve` returns it.
    """
    if is_loopback(host) or _warned.is_set():
        return
    _warned.set()
    logger.warning(
        "links over %s are neither authenticated nor encrypted: anybody who reaches the port can"
        " link,"
        " and read and write the caches; set LLMConfig.link_secret on all instances",
        host,
    )

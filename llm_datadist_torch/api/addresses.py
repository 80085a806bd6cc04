# SPDX-License-Identifier: Apache-2.0
"""Addresses as people write them: "host:port" with names, IPv4 and IPv6."""

from __future__ import annotations

import ipaddress
import socket

from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.config import parse_listen_ip_info
from llm_datadist_torch.values.status import LLMStatusCode, error_for

WILDCARD = "0.0.0.0"  # noqa: S104 (this is where it is recognised)


def format_address(host: str, port: int) -> str:
    """Write an address as "host:port", or "[host]:port" for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_address(text: str) -> tuple[str, int]:
    """Parse where to listen; a name is looked up. ":port" means all interfaces.

    Returns:
        A numeric address and the port, 0 for any free one.

    Raises:
        TypeError: ``text`` is not a str.
        LLMParamError: It is not an address.
        LLMLinkError: The name is not known.
    """
    check_isinstance("listen", text, str, allow_none=False)
    host, port = parse_listen_ip_info(text, "listen")
    return resolve(host, port)[0] if host else (WILDCARD, port)


def peer_address(address: str | tuple[str, int]) -> tuple[str, int]:
    """Parse where a peer listens.

    Returns:
        Host, a name or a numeric address, and port.

    Raises:
        TypeError: ``address`` is neither text nor a pair.
        LLMParamError: It is not an address, or has no host or port.
    """
    if isinstance(address, tuple):
        if len(address) != 2:
            raise param_error(f"address={address!r} is no pair of host and port")
        host, port = address
        check_isinstance("address[0]", host, str, allow_none=False)
        check_isinstance("address[1]", port, int, allow_none=False)
        address = format_address(host, port)
    check_isinstance("address", address, str, allow_none=False)
    host, port = parse_listen_ip_info(address, "address")
    if not host or not port:
        missing = "host" if not host else "port"
        raise param_error(f"address={address!r} has no {missing}", remedy='write "host:port".')
    return host, port


def resolve(host: str, port: int) -> list[tuple[str, int]]:
    """Look a host up; numeric addresses are themselves. Blocks for as long as the resolver does.

    Returns:
        Its addresses, numeric, in the resolver's order of preference.

    Raises:
        LLMLinkError: The name is not known.
    """
    try:
        return [(str(ipaddress.ip_address(host)), port)]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise error_for(
            LLMStatusCode.LLM_LINK_FAILED,
            f"the host {host!r} is not known: {error}",
            remedy="check the name, or give its address.",
        ) from None
    return list(dict.fromkeys((str(entry[4][0]), port) for entry in found))

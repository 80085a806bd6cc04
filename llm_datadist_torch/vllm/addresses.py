# SPDX-License-Identifier: Apache-2.0
"""Which address of this host a worker listens on, and which one peers are told."""

from __future__ import annotations

import ctypes
import ipaddress
import socket

from llm_datadist_torch.values.environment import environment_text

_AF_INET, _AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)


def local_address(text: str) -> str:
    """The address to listen on.

    Args:
        text: An address (IPv6 also in brackets), a wildcard, a name, "interface:NAME",
            "subnet:ADDRESS/BITS" or "env:VARIABLE".

    Raises:
        ValueError: It names no address of this host, with those that there are.
    """
    form, _, rest = text.partition(":")
    if form == "env":
        value = environment_text(rest)
        if not value:
            raise ValueError(f"host={text!r}: the environment variable {rest} is not set")
        return local_address(value)
    if form == "interface":
        found = [address for name, address in interface_addresses() if name == rest]
        return _first(text, found)
    if form == "subnet":
        network = ipaddress.ip_network(rest, strict=False)
        found = [
            address
            for _, address in interface_addresses()
            if ipaddress.ip_address(address) in network
        ]
        return _first(text, found)
    return address_of(text)


def advertised(text: str, listen: str) -> str:
    """The address or name that peers are told.

    Args:
        text: As for :func:`local_address`; a name stays a name.
        listen: The address that is listened on.

    Raises:
        ValueError: It is a wildcard, or as for :func:`local_address`.
    """
    if text.partition(":")[0] in ("env", "interface", "subnet"):
        text = local_address(text)
    text = text.strip("[]")
    if is_wildcard(text):
        raise ValueError(
            f'peers can\'t reach {text!r}, on which host={listen!r} listens: set "advertise" to an'
            ' address of this host, or to "interface:NAME", "subnet:ADDRESS/BITS" or "env:VARIABLE"'
        )
    return text


def address_of(host: str) -> str:
    """The address of a host: itself, or what its name is looked up to. May block.

    Raises:
        ValueError: There is none.
    """
    bare = host.strip("[]")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r} has no address: {error}") from None
    return str(found[0][4][0])


def is_wildcard(address: str) -> bool:
    """Whether an address stands for all of a host."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def listen_text(address: str, port: int) -> str:
    """``listen_ip_info`` of an address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host, IPv4 first; link-local ones of IPv6 are left out."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found: list[tuple[int, str, str]] = []
    try:
        entry = head
        while entry:
            each = entry.contents
            text = _address_text(each.address)
            if text is not None:
                found.append((*text, each.name.decode()))
            entry = each.next
    finally:
        libc.freeifaddrs(head)
    return [(name, address) for _, address, name in sorted(found, key=lambda each: each[0])]


class _IfAddrs(ctypes.Structure):
    """The beginning of ``struct ifaddrs``."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def _address_text(pointer: int | None) -> tuple[int, str] | None:
    """(IP version, text) of a ``struct sockaddr``."""
    if not pointer:
        return None
    family = ctypes.c_ushort.from_address(pointer).value
    if family == _AF_INET:
        return 4, socket.inet_ntop(family, ctypes.string_at(pointer + 4, 4))
    if family == _AF_INET6:
        text = socket.inet_ntop(family, ctypes.string_at(pointer + 8, 16))
        return None if ipaddress.IPv6Address(text).is_link_local else (6, text)
    return None


def _first(text: str, found: list[str]) -> str:
    if not found:
        there = ", ".join(f"{address} ({name})" for name, address in interface_addresses())
        raise ValueError(f"host={text!r} is no address of this host, which has {there or 'none'}")
    return found[0]

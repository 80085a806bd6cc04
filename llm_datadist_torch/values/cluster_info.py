# SPDX-License-Identifier: Apache-2.0
"""LLMClusterInfo: who to link with, and at which address; and how addresses are stored."""

from __future__ import annotations

import ipaddress
import socket
import struct

from llm_datadist_torch.values.checks import (
    UINT32_MAX,
    check_isinstance,
    check_uint16,
    check_uint64,
    param_error,
    shown,
)
from llm_datadist_torch.values.enums import LLMRole

_UINT32 = struct.Struct("<I")


def trans_str_ip(ip: str) -> int:
    """Turns IPv4 text into the little-endian uint32 of its four bytes (reference API, 5).

    Short forms such as "127.1" pass, as `inet_aton` has it: "1.2.3.4" gives 67305985.

    Raises:
        LLMParamError: not an IPv4 address. It is a RuntimeError, as in the reference, and a
            ValueError.
    """
    try:
        # The C function stops reading at a blank, and takes whatever follows for granted.
        if any(character.isspace() for character in ip):
            raise ValueError("blank in address")
        (value,) = _UINT32.unpack(socket.inet_aton(ip))
    except (OSError, ValueError):
        raise param_error(
            f"{ip!r} is not an IP address.", remedy="give digits; host names are not looked up"
        ) from None
    return int(value)


def entry_to_host(ip: int | str) -> str:
    """Turns an entry's address back into text: "127.0.0.1" for 16777343, IPv6 text as it is."""
    return ip if isinstance(ip, str) else socket.inet_ntoa(_UINT32.pack(ip))


def _to_entry(name: str, ip: str | int, port: int) -> tuple[int | str, int]:
    ip = check_isinstance(name, ip, (str, int), allow_none=False)
    port = check_uint16("port", port)
    if isinstance(ip, int):
        if not 0 <= ip <= UINT32_MAX:
            raise ValueError(f"{name}={shown(ip)} is out of range [0, {UINT32_MAX}]")
        return ip, port
    if _is_ipv6(ip):
        return ip, port
    return trans_str_ip(ip), port


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


class LLMClusterInfo:
    """A peer to link with (reference API, 5). Starts without ids, with empty lists."""

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[int | str, int]] = []
        self._remote_ip_info_list: list[tuple[int | str, int]] = []

    @property
    def remote_cluster_id(self) -> int | None:
        """Cluster id of the peer, None until it is set. uint64: TypeError, ValueError otherwise."""
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, value: int) -> None:
        self._remote_cluster_id = check_uint64("remote_cluster_id", value)

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        """Role of the peer; never used. TypeError for anything but LLMRole, int and None."""
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, value: LLMRole | int | None) -> None:
        self._remote_role_type = check_isinstance("remote_role_type", value, (LLMRole, int))

    def append_local_ip_info(self, ip: str | int, port: int) -> None:
        """Adds an address of this side.

        Args:
            ip: IPv4 text, IPv6 text (not in the reference), or a little-endian uint32.
            port: uint16.

        Raises:
            TypeError: `ip` or `port` of a wrong type.
            ValueError: `port` outside uint16, or an int `ip` outside uint32.
            LLMParamError: not an address. It is a RuntimeError too, as in the reference.
        """
        self._local_ip_info_list.append(_to_entry("ip", ip, port))

    def append_remote_ip_info(self, ip: str | int, port: int) -> None:
        """Adds an address of the peer; as `append_local_ip_info`."""
        self._remote_ip_info_list.append(_to_entry("ip", ip, port))

    @property
    def local_ip_info_list(self) -> list[tuple[int | str, int]]:
        """The live list of (address, port); see `entry_to_host`."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[int | str, int]]:
        """The live list of (address, port); see `entry_to_host`."""
        return self._remote_ip_info_list

    def __repr__(self) -> str:
        return (
            f"LLMClusterInfo(remote_cluster_id={self._remote_cluster_id}, "
            f"remote_role_type={self._remote_role_type}, "
            f"local_ip_info_list={self._local_ip_info_list}, "
            f"remote_ip_info_list={self._remote_ip_info_list})"
        )

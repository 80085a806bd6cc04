# SPDX-License-Identifier: Apache-2.0
"""Rank tables: who the members of a communicator are, and where the first of them can be met."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from llm_datadist_torch.values.checks import param_error

VERSIONS = ("1.0", "1.2")
LOOPBACK = "127.0.0.1"
_PORTS = range(16384, 32768)
"""Below the ports that the system gives to outgoing connections."""


class Member(NamedTuple):
    """One instance of a communicator. Members are in order of their ranks."""

    rank: int
    cluster_id: int


class _Device(msgspec.Struct):
    rank_id: int | str
    device_ip: str = ""


class _Server(msgspec.Struct):
    device: list[_Device]
    server_id: int | str = ""
    host_ip: str = ""


class _Table(msgspec.Struct):
    version: str
    server_list: list[_Server]
    server_count: int | str | None = None
    status: str = "completed"


def members_of(cluster_rank_info: Mapping[int, int]) -> list[Member]:
    """The members, in the same order on all of them."""
    return sorted(Member(rank, cluster_id) for cluster_id, rank in cluster_rank_info.items())


def port_of(name: str) -> int:
    """The port at which the members of a communicator of this name meet."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return _PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)]


def meeting_hosts(rank_table: str, members: list[Member]) -> list[str]:
    """Where the first member can be met: its addresses, those to be tried first at the beginning.

    The ``host_ip`` of its server alone, where there is one. Else what may be an address of its
    host, or of something else: the ``server_id`` if it has the form of one, else the ``device_ip``
    unless all members are on one server. Then loopback, where members on one host meet whatever
    stands in the table.

    Args:
        rank_table: JSON of version 1.0 or 1.2.
        members: All of them must be in the table.

    Raises:
        LLMParamError: No such JSON, a table that is not completed or contradicts itself, a member
            without entry, or a text that is not an address.
    """
    table = _parse(rank_table)
    places = _places(table)
    missing = [member.rank for member in members if str(member.rank) not in places]
    if missing:
        raise _table_error(f"has no rank_id {missing[0]}")
    server, device = places[str(members[0].rank)]
    for name, text in (("host_ip", server.host_ip), ("device_ip", device.device_ip)):
        if text and not _is_address(text):
            raise _table_error(f"has {name}={text!r}, which is no IP address")
    if server.host_ip:
        return [server.host_ip]
    if _is_address(str(server.server_id)):
        return [str(server.server_id), LOOPBACK]
    one_server = all(places[str(member.rank)][0] is server for member in members)
    return [LOOPBACK] if one_server or not device.device_ip else [device.device_ip, LOOPBACK]


def _parse(rank_table: str) -> _Table:
    try:
        table = msgspec.json.decode(rank_table, type=_Table)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _table_error(f"is no such table: {error}") from None
    if table.version not in VERSIONS:
        raise _table_error(f"has version {table.version!r}, not one of {', '.join(VERSIONS)}")
    if table.status != "completed":
        raise _table_error(f"has status {table.status!r}, not 'completed'")
    if table.server_count is not None and str(table.server_count) != str(len(table.server_list)):
        raise _table_error(
            f"has {len(table.server_list)} servers, but server_count={table.server_count!r}"
        )
    return table


def _places(table: _Table) -> dict[str, tuple[_Server, _Device]]:
    places: dict[str, tuple[_Server, _Device]] = {}
    for server in table.server_list:
        for device in server.device:
            rank = str(device.rank_id)
            if rank in places:
                raise _table_error(f"has rank_id {rank} twice")
            places[rank] = server, device
    return places


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _table_error(fault: str) -> Exception:
    return param_error(
        f"the rank_table {fault}",
        remedy=(
            'write e.g. {"version": "1.0", "status": "completed", "server_count": "1",'
            ' "server_list": [{"server_id": "0", "host_ip": "10.0.0.1", "device":'
            ' [{"device_id": "0", "device_ip": "10.1.0.1", "rank_id": "0"}]}]}.'
        ),
    )

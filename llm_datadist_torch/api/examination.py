# SPDX-License-Identifier: Apache-2.0
"""What an instance answers a linked peer that examines it (``doctor --peer``)."""

from __future__ import annotations

import os
import resource
import socket

import msgspec

from llm_datadist_torch.api.addresses import format_address
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.memory.container import container_limit
from llm_datadist_torch.observe.instance_report import (
    InstanceReport,
    Limits,
    ProbeCache,
    SeenChoice,
)
from llm_datadist_torch.values.versions import installed_versions

_DIAL_BACK_S = 1.0


def examine(instance: Instance, peer: int, question: bytes) -> bytes:
    """Answer EXAMINE_QUERY: an :class:`InstanceReport` as JSON.

    Blocks for up to a second where it is to connect back. It connects to the address that the
    peer's link comes from and to no other, so that nobody can send it elsewhere.

    Args:
        instance: Which is examined.
        peer: Who asks.
        question: A port of the peer to connect to, in decimal; empty for none.
    """
    port = int(question) if question.isdigit() and int(question) < 1 << 16 else 0
    link = instance.links.registry.linked(peer)
    info = None if link is None else LinkInfo.of(link)
    address = None if link is None else link.connection.remote_address
    listening = instance.links.endpoint.listen_address
    report = InstanceReport(
        cluster_id=instance.cluster_id,
        pid=os.getpid(),
        host=socket.gethostname(),
        versions=installed_versions(),
        device=str(instance.device.device),
        listen="" if listening is None else format_address(*listening),
        secured=instance.config.link_secret is not None,
        transports=tuple(instance.transports.names),
        unavailable=instance.transports.unavailable,
        choices=() if info is None else seen(info),
        not_local="" if info is None else info.not_local,
        limits=limits(),
        dial_back=_why_not_reached(address, port) if address and port else None,
        probe=_probe(instance),
    )
    return msgspec.json.encode(report)


def seen(info: LinkInfo) -> tuple[SeenChoice, ...]:
    """The choices of one side of a link."""
    return tuple(SeenChoice(each.memory, each.transport, each.reason) for each in info.choices)


def limits() -> Limits:
    """What this process may have. Swap counts as none."""
    return Limits(
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        memory_bytes=container_limit(0),
    )


def _soft_limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _why_not_reached(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), _DIAL_BACK_S).close()
    except OSError as error:
        return f"{format_address(address, port)}: {error}"
    return ""


def _probe(instance: Instance) -> ProbeCache | None:
    """The largest blocks cache that has a name; one in device memory comes first."""
    found = (instance.catalog.get(cache_id) for cache_id in instance.catalog.ids())
    probes = [probe for entry in found if entry is not None and (probe := _as_probe(entry))]
    return max(probes, key=_probe_rank, default=None)


def _as_probe(entry: CacheEntry) -> ProbeCache | None:
    names = [name.model_id for name in list(entry.keys) if name.kind is KeyKind.BLOCKS]
    if not names or not entry.remote_accessible:
        return None
    layout = entry.layout
    return ProbeCache(
        model_id=names[0],
        cache_id=entry.cache_id,
        tensors=layout.num_tensors,
        blocks=layout.rows,
        block_bytes=layout.row_bytes,
        device=str(entry.device),
    )


def _probe_rank(probe: ProbeCache) -> tuple[bool, int]:
    return probe.device != "cpu", probe.tensors * probe.blocks * probe.block_bytes

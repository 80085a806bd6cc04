# SPDX-License-Identifier: Apache-2.0
"""Rank tables for tests."""

from __future__ import annotations

import json
from typing import Any

from tests.peers import Service


def device(rank: int, **further: str) -> dict[str, str]:
    return {
        "device_id": str(rank),
        "device_ip": f"192.168.0.{rank}",
        "rank_id": str(rank),
    } | further


def server(server_id: str, *devices: dict[str, str], **further: str) -> dict[str, Any]:
    return {"server_id": server_id, "device": list(devices)} | further


def table(*servers: dict[str, Any], **further: Any) -> str:
    return json.dumps(
        {
            "version": "1.0",
            "status": "completed",
            "server_count": str(len(servers)),
            "server_list": list(servers),
        }
        | further
    )


WAIT_MS = 60_000
TABLE = table(server("0", *(device(rank) for rank in range(4))))


def members(*cluster_ids: int) -> dict[int, int]:
    return {cluster_id: rank for rank, cluster_id in enumerate(cluster_ids)}


def status_of(service: Service, comm_id: int) -> str:
    return service.dd.query_register_mem_status(comm_id).name

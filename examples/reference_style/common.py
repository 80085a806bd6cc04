# SPDX-License-Identifier: Apache-2.0
"""What the samples share: their arguments, the way two processes wait for each other, a link."""

from __future__ import annotations

import argparse
from datetime import timedelta

import llm_datadist as ld
import torch
from torch.distributed import TCPStore

PROMPT_ID, DECODER_ID = 1, 2


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--role", choices=("prompt", "decoder"), required=True)
    parser.add_argument("--prompt-ip", default="127.0.0.1")
    parser.add_argument("--prompt-port", type=int, default=26000)
    parser.add_argument("--decoder-ip", default="127.0.0.1")
    parser.add_argument("--decoder-port", type=int, default=26001)
    parser.add_argument("--meet-port", type=int, default=26002, help="where the two wait")
    parser.add_argument("--device-id", type=int, default=0)
    return parser.parse_args()


class Meeting:
    """All processes wait until the others have come as far. The first prompt keeps the store."""

    def __init__(
        self, args: argparse.Namespace, parties: int = 2, *, keeper: bool | None = None
    ) -> None:
        self._parties = parties
        self._keeper = args.role == "prompt" if keeper is None else keeper
        self._store = TCPStore(
            args.prompt_ip,
            args.meet_port,
            world_size=parties,
            is_master=self._keeper,
            timeout=timedelta(seconds=60),
        )

    def wait(self, point: str) -> None:
        if self._store.add(f"{point} arrived", 1) == self._parties:
            self._store.set(point, "go")
        self._store.wait([point])

    def put(self, name: str, number: int) -> None:
        self._store.set(name, str(number))

    def get(self, name: str) -> int:
        return int(self._store.get(name))

    def part(self) -> None:
        """The process with the store leaves last."""
        if self._keeper:
            self._store.wait(["all others left"])
        elif self._store.add("left", 1) == self._parties - 1:
            self._store.set("all others left", "yes")


def peer_info(cluster_id: int, ip: str, port: int, local_ip: str) -> ld.LLMClusterInfo:
    cluster = ld.LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    cluster.append_local_ip_info(local_ip, 0)
    cluster.append_remote_ip_info(ip, port)
    return cluster


def link(datadist: ld.LLMDataDist, cluster: ld.LLMClusterInfo) -> None:
    status, results = datadist.link_clusters([cluster], timeout=10000)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"linking failed: {status} {results}")


def unlink(datadist: ld.LLMDataDist, cluster: ld.LLMClusterInfo) -> None:
    status, results = datadist.unlink_clusters([cluster], timeout=10000)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"unlinking failed: {status} {results}")


def expect(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.equal(got, wanted):
        raise SystemExit(f"{what}: got {got.flatten()[:4]}..., wanted {wanted.flatten()[:4]}...")
    print(f"{what}: ok", flush=True)


def numbered(rows: int, width: int, first: int) -> torch.Tensor:
    """Row r is full of first + r."""
    return (first + torch.arange(rows, dtype=torch.float32))[:, None].repeat(1, width)

# SPDX-License-Identifier: Apache-2.0
"""What the programs share: a gloo group as torchrun gives it, the device of a rank, checks."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from llm_datadist import (
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)

IP = "127.0.0.1"
PORT = int(os.environ["FIRST_PORT"])
"""Instances that listen are told this port and those after it."""
TRANSPORT = os.environ.get("TRANSPORT")
"""Instances of programs that choose no engine themselves are told this one."""
PAGE = 512
"""torch_npu's allocator starts tensors at multiples of this."""


def start() -> tuple[int, int]:
    """Join the group and set the device of this process; returns the rank and the device."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    device_id = dist.get_rank() % torch_npu.npu.device_count()
    torch_npu.npu.set_device(device_id)
    return dist.get_rank(), device_id


def finish(*datadists: LLMDataDist) -> None:
    # A peer that asks to unlink must still find who it asks.
    dist.barrier()
    for datadist in datadists:
        for path in sorted({counter.path for counter in datadist.stats().transfers}):
            print(f"moved by {path}", flush=True)
        datadist.finalize()
    dist.barrier()
    dist.destroy_process_group()
    print("done", flush=True)


def start_datadist(
    role: LLMRole,
    cluster_id: int,
    device_id: int,
    *,
    port: int | None = None,
    remote: bool = False,
    pool: int = 0,
) -> LLMDataDist:
    """An instance that listens where a port is given."""
    config = LLMConfig()
    config.device_id = device_id
    config.enable_cache_manager = True
    config.sync_kv_timeout = 60000
    config.transport = TRANSPORT
    if remote:
        config.enable_remote_cache_accessible = True
    if port is not None:
        config.listen_ip_info = f"{IP}:{port}"
    if pool:
        config.mem_pool_cfg = json.dumps({"memory_size": pool})
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def cluster_of(cluster_id: int, port: int, local_port: int = 0) -> LLMClusterInfo:
    """Who listens at a port, and where this instance would, if it did."""
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    cluster.append_local_ip_info(IP, local_port)
    cluster.append_remote_ip_info(IP, port)
    return cluster


def link_clusters(datadist: LLMDataDist, *clusters: LLMClusterInfo) -> None:
    status, results = datadist.link_clusters(list(clusters), 60000)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"link_clusters: {status}, {results}")


def unlink_clusters(datadist: LLMDataDist, *clusters: LLMClusterInfo, force: bool = False) -> None:
    status, results = datadist.unlink_clusters(list(clusters), 60000, force=force)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"unlink_clusters: {status}, {results}")


def link_by_table(datadist: LLMDataDist, name: str, ranks: dict[int, int], table: Any) -> int:
    """Link, and wait for the memory of all members."""
    comm_id = datadist.link(name, ranks, json.dumps(table))
    deadline = time.monotonic() + 120
    while (status := datadist.query_register_mem_status(comm_id)) != RegisterMemStatus.OK:
        if status == RegisterMemStatus.FAILED or time.monotonic() > deadline:
            raise SystemExit(f"{name}: {status}")
        time.sleep(0.02)
    return comm_id


def device_of(rank: int) -> dict[str, str]:
    """A device as rank tables have it; its address is one of the devices' own network."""
    device_id = rank % torch_npu.npu.device_count()
    return {"device_id": str(device_id), "device_ip": f"10.170.22.{rank}", "rank_id": str(rank)}


def in_pages(tensors: int, rows: int, width: int) -> list[torch.Tensor]:
    """Zeros side by side in one allocation, each from a multiple of 512 bytes on, but no other."""
    room = -(-rows * width * 4 // PAGE) * PAGE // 4
    memory = torch.zeros(tensors * room + PAGE // 4, dtype=torch.float32).npu()
    odd = PAGE // 4 if memory.data_ptr() % (2 * PAGE) == 0 else 0
    starts = range(odd, odd + tensors * room, room)
    return [memory[at : at + rows * width].view(rows, width) for at in starts]


def number(tensors: list[torch.Tensor], first: int) -> None:
    """Every element of a cache another number, the first of tensor t is first + 1000 t."""
    for at, tensor in enumerate(tensors):
        tensor.copy_(numbers(tensor.shape, first + 1000 * at))
    torch_npu.npu.synchronize()


def numbers(shape: Any, first: int) -> torch.Tensor:
    return first + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(*shape)


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def expect(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    got = got.cpu()
    if got.shape != wanted.shape or not torch.equal(got, wanted):
        raise SystemExit(f"{what}: got {got.flatten()[:6]}, wanted {wanted.flatten()[:6]}")
    print(f"{what}: ok", flush=True)

# SPDX-License-Identifier: Apache-2.0
"""The steps of ``doctor --npu-selftest``, in a process that has the NPUs.

Each is a function that returns facts. What the simulated runtime answers stands beside it, so that
whoever reads a report of a real NPU sees at once what differs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheDesc,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist_torch.memory.npu_address import torch_npu
from llm_datadist_torch.values.environment import npu_is_simulated

Facts = dict[str, Any]
US, PEER = 1, 2
"""Cluster ids."""
BLOCKS, BLOCK_BYTES = 64, 16384
_BANDWIDTH_BYTES = 64 << 20
_REPEATS = 5
_TIMEOUT_MS = 60_000
_MIB = 1 << 20

STEPS: list[tuple[str, Callable[[], Facts], Facts]] = []


def _step(**simulator: Any) -> Callable[[Callable[[], Facts]], Callable[[], Facts]]:  # noqa: ANN401
    """A step, and the facts that the simulated runtime gives."""

    def add(step: Callable[[], Facts]) -> Callable[[], Facts]:
        STEPS.append((step.__name__.replace("_", " "), step, simulator))
        return step

    return add


# -- one device -----------------------------------------------------------------------------------


@_step()
def device() -> Facts:
    """What there is."""
    npu = torch_npu().npu
    count = npu.device_count()
    return {
        "torch": torch.__version__,
        "torch_npu": torch_npu().__version__,
        "devices": [npu.get_device_name(index) for index in range(count)],
        "free_and_total_bytes": list(npu.mem_get_info(0)),
    }


@_step(allocator_multiple=512, cache_starts_at_2_mib=True, tensors_start_at_64_kib=True)
def alignment() -> Facts:
    """Where torch_npu's tensors start, and where those of caches do."""
    odd = [torch.empty(1000, dtype=torch.uint8, device="npu:0") for _ in range(16)]
    multiple = max(1 << shift for shift in range(22) if all(_on(each, shift) for each in odd))
    with start(US, 0, None) as datadist:
        cache = _blocks(datadist)
        return {
            "allocator_multiple": multiple,
            "cache_starts_at_2_mib": cache.tensor_addrs[0] % (2 * _MIB) == 0,
            "tensors_start_at_64_kib": all(at % 65536 == 0 for at in cache.tensor_addrs),
        }


@_step(copied=True, swapped_back=True, in_order_with_kernels=True)
def copies_on_a_stream() -> Facts:
    """Copies in a device and to the host and back, after kernels that are not waited for."""
    with start(US, 0, None) as datadist:
        manager = datadist.cache_manager
        cache = _blocks(datadist)
        host = manager.create_host_cache(
            CacheDesc(2, [BLOCKS, BLOCK_BYTES], torch.uint8, Placement.HOST)
        )
        for tensor in cache.tensors:
            tensor.copy_(pattern())
        manager.copy_blocks(cache, {0: [5], 1: [6, 7]})
        copied = all(torch.equal(t[[5, 6, 7]].cpu(), pattern()[[0, 1, 1]]) for t in cache.tensors)
        manager.swap_blocks(cache, host, {8: 0, 9: 1})
        for tensor in cache.tensors:
            tensor.zero_()
        manager.swap_blocks(host, cache, {0: 2, 1: 3})
        swapped = all(torch.equal(t[[2, 3]].cpu(), pattern()[[8, 9]]) for t in cache.tensors)
        for tensor in cache.tensors:
            tensor.fill_(7)
        manager.copy_blocks(cache, {0: [1]}, non_blocking=True)
        for tensor in cache.tensors:
            tensor[0].fill_(9)
        ordered = all(t[:2, 0].cpu().tolist() == [9, 7] for t in cache.tensors)
        return {"copied": copied, "swapped_back": swapped, "in_order_with_kernels": ordered}


@_step(pinned=True, plain_is_not=True)
def pinned_memory() -> Facts:
    """Whether torch_npu pins, and tells it from what isn't pinned."""
    return {
        "pinned": torch.zeros(_MIB).pin_memory().is_pinned(),
        "plain_is_not": not torch.zeros(_MIB).is_pinned(),
    }


# -- two processes --------------------------------------------------------------------------------

_MOVED: Facts = {"pulled": True, "pushed": True, "registered_later": True, "unregistered": True}


@_step(moved_by="local", **_MOVED, paths=["device-ipc"])
def between_processes_by_local() -> Facts:
    """AscendCL's IPC: keys, opening, memory that comes later, closing; ``paths`` says if it was."""
    return _between_processes("local")


@_step(moved_by="hixl", **_MOVED, paths=["hixl"])
def between_processes_by_hixl() -> Facts:
    """HIXL: registration, connection, transfer, reconnection for later memory, deregistration."""
    return _between_processes("hixl")


@_step()
def bandwidth_by_local() -> Facts:
    """GB/s of pulls by the size of a block; on the simulated runtime only that they work."""
    return _bandwidths("local")


@_step()
def bandwidth_by_hixl() -> Facts:
    """The same through HIXL."""
    return _bandwidths("hixl")


def _between_processes(transport: str) -> Facts:
    facts: Facts = {}
    with _peer(transport) as send, start(US, 0, transport) as datadist:
        port = send("listen")
        began = time.monotonic()
        _link(datadist, port)
        facts["link_s"] = round(time.monotonic() - began, 3)
        facts["moved_by"] = datadist.links()[0].transport("device")
        cache, manager = _blocks(datadist), datadist.cache_manager
        order = torch.randperm(BLOCKS)
        every = torch.arange(BLOCKS)
        began = time.monotonic()
        manager.pull_blocks(BlocksCacheKey(PEER, 0), cache, order, every)
        facts["first_pull_s"] = round(time.monotonic() - began, 3)
        facts["pulled"] = all(
            torch.equal(tensor.cpu(), pattern()[order]) for tensor in cache.tensors
        )
        for tensor in cache.tensors:
            tensor.copy_(pattern() ^ 255)
        manager.push_blocks(BlocksCacheKey(PEER, 0), cache, every, every)
        facts["pushed"] = send("sum") == sum_of(pattern() ^ 255)
        send("register", 1)
        began = time.monotonic()
        manager.pull_blocks(BlocksCacheKey(PEER, 1), cache, [0], [1])
        facts["later_memory_s"] = round(time.monotonic() - began, 3)
        facts["registered_later"] = torch.equal(cache.tensors[0][1].cpu(), pattern()[0])
        began = time.monotonic()
        send("unregister")
        facts["unregister_s"] = round(time.monotonic() - began, 3)
        manager.pull_blocks(BlocksCacheKey(PEER, 0), cache, [3], [3])
        facts["unregistered"] = torch.equal(cache.tensors[1][3].cpu(), (pattern() ^ 255)[3])
        facts["paths"] = sorted({each.path for each in datadist.stats().transfers})
    return facts


def _bandwidths(transport: str) -> Facts:
    total = _MIB if npu_is_simulated() else _BANDWIDTH_BYTES
    facts: Facts = {}
    with _peer(transport) as send, start(US, 0, transport) as datadist:
        _link(datadist, send("listen"))
        for shift in (12, 14, 16, 18, 20):
            size = 1 << shift
            count = total // size
            send("allocate", count, size)
            cache = _blocks(datadist, count, size)
            # Blocks that lie side by side on no side, so that nothing is merged.
            order = torch.arange(count).view(2, -1).T.flatten() if count > 1 else torch.arange(1)
            seconds = []
            for _ in range(1 + _REPEATS):
                began = time.monotonic()
                datadist.cache_manager.pull_blocks(
                    BlocksCacheKey(PEER, size), cache, torch.arange(count), order
                )
                seconds.append(time.monotonic() - began)
            rate = 2 * total / statistics.median(seconds[1:]) / 1e9
            facts[f"{size} bytes"] = "works" if npu_is_simulated() else round(rate, 3)
            datadist.cache_manager.deallocate_blocks_cache(cache)
    return facts


# -- parts ----------------------------------------------------------------------------------------


def start(cluster_id: int, device_id: int, transport: str | None) -> LLMDataDist:
    """An instance on an NPU, which listens on loopback."""
    config = LLMConfig()
    config.device = "npu"
    config.device_id = device_id
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    config.sync_kv_timeout = _TIMEOUT_MS
    if transport is not None:
        config.transport = transport
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options())
    return datadist


@contextmanager
def _peer(transport: str) -> Iterator[Callable[..., Any]]:
    """A process with an instance on another NPU, if there is one, that does what it is told."""
    device_id = torch_npu().npu.device_count() - 1
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_datadist_torch.cli.selftest_peer", str(device_id), transport],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def send(*words: Any) -> Any:  # noqa: ANN401
        print(json.dumps(words), file=process.stdin, flush=True)
        for line in process.stdout or ():
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the peer ended with status {process.wait(10)}")

    with process:
        try:
            yield send
        finally:
            process.kill()


def _link(datadist: LLMDataDist, port: int) -> None:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PEER
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    status, _ = datadist.link_clusters([cluster], _TIMEOUT_MS)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"link_clusters: {status.name}")


def _blocks(datadist: LLMDataDist, count: int = BLOCKS, size: int = BLOCK_BYTES) -> Any:  # noqa: ANN401
    return datadist.cache_manager.allocate_blocks_cache(CacheDesc(2, [count, size], torch.uint8))


def pattern() -> torch.Tensor:
    """Bytes [BLOCKS, BLOCK_BYTES], every block another."""
    rows = torch.arange(BLOCKS, dtype=torch.int64)[:, None] * 37
    return ((rows + torch.arange(BLOCK_BYTES)) % 251).to(torch.uint8)


def sum_of(data: torch.Tensor) -> int:
    """Tells one content from another."""
    return int((data.to(torch.int64) * (torch.arange(BLOCK_BYTES) % 127 + 1)).sum())


def _on(tensor: torch.Tensor, shift: int) -> bool:
    return tensor.data_ptr() % (1 << shift) == 0


def run(write: Callable[[str, Facts], None]) -> None:
    """Go through all steps; whatever one raises is a fact, and the next goes on."""
    for name, step, simulator in STEPS:
        began = time.monotonic()
        try:
            facts = step()
            differs = [key for key, value in simulator.items() if facts.get(key) != value]
            entry: Facts = {"ok": not differs, "facts": facts, "differs": differs}
        except Exception as error:  # noqa: BLE001 (the report is of what went wrong)
            entry = {"ok": False, "facts": {}, "error": f"{type(error).__name__}: {error}"}
        entry["simulator"] = simulator
        entry["seconds"] = round(time.monotonic() - began, 2)
        write(name, entry)


if __name__ == "__main__":
    run(lambda name, entry: print("STEP " + json.dumps([name, entry]), flush=True))  # noqa: T201

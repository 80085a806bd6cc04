# SPDX-License-Identifier: Apache-2.0
"""Links of one instance with many peers: set-up time, and what they cost while nothing happens.

The peers are instances in two other processes. *cold* links a fresh instance with all peers in one
call of ``link_clusters``, *warm* does so again after unlinking. Then the links are left idle, pulls
of one small block are timed, and it is counted what each link takes. ``--option KEY=VALUE`` (for
example ``--option llm.LinkSecret=...``) sets an option of all instances."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import common
from llm_datadist_torch import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
)
from llm_datadist_torch.links.table import LinkTable
from llm_datadist_torch.net import connection

COUNTS = (1, 16, 128)
ME, FIRST_PEER = 1, 100
HOSTS = 2
DESC = CacheDesc(1, [4, 4096], DataType.DT_UINT8)
TIMEOUT_MS = 60_000

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "llm_datadist_torch"])


def start_instance(cluster_id: int, options: dict[str, str]) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.device = "cpu"
    config.listen_ip_info = "127.0.0.1:0"
    config.sync_kv_timeout = TIMEOUT_MS
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options() | options)
    return datadist


def resident(pid: int | str = "self") -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def infos(addresses: list[tuple[int, int]]) -> list[LLMClusterInfo]:
    made = []
    for peer, port in addresses:
        info = LLMClusterInfo()
        info.remote_cluster_id = peer
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info("127.0.0.1", port)
        made.append(info)
    return made


def host(pipe: Connection, first: int, count: int, options: dict[str, str]) -> None:
    """A process full of peers, each with a cache of its own."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    before = resident()
    peers = [start_instance(first + number, options) for number in range(count)]
    for peer in peers:
        key = BlocksCacheKey(peer.cluster_id, 0)
        peer.cache_manager.allocate_blocks_cache(DESC, key)
    pipe.send([(peer.cluster_id, peer.listen_address[1]) for peer in peers])
    pipe.send((resident() - before) / count)
    while (command := pipe.recv()) is not None:
        if command == "cpu":
            pipe.send(time.process_time())
        else:
            for peer in peers[: command[1]]:
                peer.link_clusters(infos([(ME, command[0])]), TIMEOUT_MS)
            pipe.send("linked")
    for peer in peers:
        peer.finalize()


class Hosts:
    """The processes with the peers."""

    def __init__(self, count: int, options: dict[str, str]) -> None:
        share = -(-count // HOSTS)
        self.pipes, self.processes = [], []
        for number in range(HOSTS):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=host, args=(theirs, FIRST_PEER + number * share, share, options), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.addresses: list[tuple[int, int]] = []
        self.bytes_per_instance = 0.0
        for pipe in self.pipes:
            self.addresses += pipe.recv()
            self.bytes_per_instance = pipe.recv()

    def cpu(self) -> float:
        """CPU seconds that they have used."""
        for pipe in self.pipes:
            pipe.send("cpu")
        return sum(pipe.recv() for pipe in self.pipes)

    def dial(self, port: int, count: int) -> None:
        for pipe in self.pipes:
            pipe.send((port, -(-count // HOSTS)))
        for pipe in self.pipes:
            pipe.recv()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """Counts control messages that this process sends and gets meanwhile: [sent, got]."""
    counts = [0, 0]
    send, on_message = connection.Connection.send, LinkTable.on_message

    def counted_send(self: connection.Connection, *args: Any) -> None:  # noqa: ANN401
        counts[0] += 1
        send(self, *args)

    def counted_on_message(self: LinkTable, *args: Any) -> None:  # noqa: ANN401
        counts[1] += 1
        on_message(self, *args)

    connection.Connection.send, LinkTable.on_message = counted_send, counted_on_message  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        connection.Connection.send, LinkTable.on_message = send, on_message  # type: ignore[method-assign]


def timed_link(datadist: LLMDataDist, clusters: list[LLMClusterInfo]) -> float:
    start = time.perf_counter()
    overall, _ = datadist.link_clusters(clusters, TIMEOUT_MS)
    seconds = time.perf_counter() - start
    if overall.name != "LLM_SUCCESS":
        raise SystemExit(f"bench_links: linking failed: {overall.name}")
    return seconds


def measure_setup(
    clusters: list[LLMClusterInfo], options: dict[str, str], rounds: int
) -> dict[str, float]:
    """Milliseconds to link all of them, and the messages for one link."""
    cold, warm = [], []
    for _ in range(rounds):
        datadist = start_instance(ME, options)
        with counted_messages() as counts:
            cold.append(timed_link(datadist, clusters))
        datadist.unlink_clusters(clusters, TIMEOUT_MS)
        warm.append(timed_link(datadist, clusters))
        datadist.finalize()
    return {
        "cold_ms": statistics.median(cold) * 1e3,
        "warm_ms": statistics.median(warm) * 1e3,
        "messages_per_setup": sum(counts) / len(clusters),
    }


def measure_idle(seconds: float, hosts: Hosts) -> dict[str, float]:
    """What this process and the peers' do while nothing is asked of them."""
    with counted_messages() as counts:
        start, own, others = time.perf_counter(), time.process_time(), hosts.cpu()
        time.sleep(seconds)
        wall = time.perf_counter() - start
        own, others = time.process_time() - own, hosts.cpu() - others
    return {
        "idle_messages_per_s": sum(counts) / wall,
        "idle_cpu_percent": own / wall * 100,
        "idle_peers_cpu_percent": others / wall * 100,
    }


def measure_pulls(
    datadist: LLMDataDist, peers: list[int], calls: int, hosts: Hosts
) -> dict[str, float]:
    """Pulls of one 4 KiB block, from one peer after the other."""
    room = datadist.cache_manager.allocate_blocks_cache(DESC)
    times = []
    with counted_messages() as counts:
        own, others = time.process_time(), hosts.cpu()
        for number in range(calls):
            key = BlocksCacheKey(peers[number % len(peers)], 0)
            start = time.perf_counter()
            datadist.cache_manager.pull_blocks(key, room, [0], [1])
            times.append(time.perf_counter() - start)
        own, others = time.process_time() - own, hosts.cpu() - others
    datadist.cache_manager.deallocate_blocks_cache(room)
    return {
        "pull_p50_us": statistics.median(times) * 1e6,
        "pull_p99_us": common.quantile(times, 0.99) * 1e6,
        "pull_messages": sum(counts) / calls,
        "pull_cpu_us": own / calls * 1e6,
        "pull_owner_cpu_us": others / calls * 1e6,
    }


def weigh(pipe: Connection, addresses: list[tuple[int, int]], options: dict[str, str]) -> None:
    """A fresh process: what links take of it that it dials, and then, that its peers dial."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # One link first, for what is there only once.
    datadist = start_instance(ME, options)
    timed_link(datadist, infos(addresses[:1]))
    before = resident(), descriptors()
    timed_link(datadist, infos(addresses[1:]))
    pipe.send((resident() - before[0], descriptors() - before[1]))
    datadist.finalize()
    datadist = start_instance(ME, options)
    before = resident(), descriptors()
    pipe.send(datadist.listen_address[1])
    pipe.recv()
    pipe.send((resident() - before[0], descriptors() - before[1]))
    datadist.finalize()


def measure_weight(hosts: Hosts, options: dict[str, str]) -> dict[str, float]:
    """Memory and descriptors per link, at either side."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=weigh, args=(theirs, hosts.addresses, options), daemon=True)
    process.start()
    dialed, port = ours.recv(), ours.recv()
    hosts.dial(port, len(hosts.addresses))
    ours.send(None)
    accepted = ours.recv()
    process.join()
    count = len(hosts.addresses)
    return {
        "instance_kib": hosts.bytes_per_instance / common.KIB,
        "dialed_kib": dialed[0] / (count - 1) / common.KIB,
        "dialed_fds": dialed[1] / (count - 1),
        "accepted_kib": accepted[0] / count / common.KIB,
        "accepted_fds": accepted[1] / count,
    }


def measure(
    count: int, hosts: Hosts, options: dict[str, str], rounds: int, calls: int, idle_s: float
) -> dict[str, Any]:
    half = count // 2
    addresses = hosts.addresses[:half] + hosts.addresses[half - count :]
    clusters, peers = infos(addresses), [peer for peer, _ in addresses]
    result: dict[str, Any] = {"links": count} | measure_setup(clusters, options, rounds)
    datadist = start_instance(ME, options)
    nothing = measure_idle(idle_s, hosts)
    timed_link(datadist, clusters)
    idle = measure_idle(idle_s, hosts)
    for name in ("idle_cpu_percent", "idle_peers_cpu_percent"):
        idle[name] -= nothing[name]
    result |= idle | measure_pulls(datadist, peers, calls, hosts)
    datadist.finalize()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=11, help="of linking")
    parser.add_argument("--calls", type=int, default=1000, help="pulls")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = dict(text.split("=", 1) for text in args.option)
    common.print_environment()
    hosts = Hosts(max(args.links), options)
    weight = measure_weight(hosts, options)
    print(", ".join(f"{name} {value:.1f}" for name, value in weight.items()))
    results = []
    for count in args.links:
        result = measure(count, hosts, options, args.rounds, args.calls, args.idle)
        results.append(result | weight | {"options": options})
        print(
            f"{count:5d} links: set-up cold {result['cold_ms']:.1f} ms, warm"
            f" {result['warm_ms']:.1f} ms; idle {result['idle_messages_per_s']:.0f} messages/s,"
            f" {result['idle_cpu_percent']:.2f} % CPU (peers"
            f" {result['idle_peers_cpu_percent']:.2f} %); pull p50 {result['pull_p50_us']:.0f} us,"
            f" {result['pull_messages']:.1f} messages, {result['pull_cpu_us']:.0f} us CPU here and"
            f" {result['pull_owner_cpu_us']:.0f} us there"
        )
    hosts.close()
    common.save(args.json, results)


if __name__ == "__main__":
    main()

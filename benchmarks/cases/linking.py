# SPDX-License-Identifier: Apache-2.0
"""Links made with many peers at once, and what they cost afterwards."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import bench_links
from benchmarks.cases import Plan
from benchmarks.measuring import TINY, Effort, contender, figures, measure, point

COUNTS = (1, 16, 64)
SOME = Effort(rounds=11, seconds=3.0)


def link(plan: Plan) -> list[dict[str, Any]]:
    """Numbers of peers; half of them in each of two processes."""
    counts = plan.sweep or ((2,) if plan.tiny else COUNTS)
    points = []
    hosts = bench_links.Hosts(max(2, *counts), {})
    try:
        weight = bench_links.measure_weight(hosts, {})
        for count in counts:
            points.append(measure_one(hosts, count, TINY if plan.tiny else SOME, weight))
            plan.show(points[-1])
    finally:
        hosts.close()
    return points


def measure_one(
    hosts: bench_links.Hosts, count: int, effort: Effort, weight: dict[str, float]
) -> dict[str, Any]:
    """One number of links, made and ended again; against bare TCP connections."""
    half = count // 2
    addresses = hosts.addresses[:half] + hosts.addresses[half - count :]
    clusters = bench_links.infos(addresses)
    datadist = bench_links.start_instance(bench_links.ME, {})
    with bench_links.counted_messages() as messages:
        bench_links.timed_link(datadist, clusters)
    datadist.unlink_clusters(clusters, bench_links.TIMEOUT_MS)

    def link_and_unlink() -> None:
        bench_links.timed_link(datadist, clusters)
        datadist.unlink_clusters(clusters, bench_links.TIMEOUT_MS)

    with echo() as address:
        calls = {
            "link and unlink": link_and_unlink,
            "TCP, one message each way": lambda: connect(address, count),
        }
        taken = measure(calls, effort, [process.pid for process in hosts.processes])
    datadist.finalize()
    contenders = [
        contender(
            "link and unlink",
            "ours",
            figures(taken["link and unlink"], units=count),
            (),
            "TCP, one message each way",
        ),
        contender(
            "TCP, one message each way",
            "ceiling",
            figures(taken["TCP, one message each way"], units=count),
        ),
    ]
    further = {"messages_per_link": sum(messages) / count, **weight}
    rounds = len(taken["link and unlink"].seconds)
    return point({"links": count}, contenders, rounds=rounds, further=further)


@contextmanager
def echo() -> Iterator[tuple[str, int]]:
    """A listener that answers one message on each connection."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def work() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if connection.recv(64) == b"end":
                    return
                connection.sendall(b"x" * 64)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield listener.getsockname()
    with socket.create_connection(listener.getsockname()) as last:
        last.sendall(b"end")
    thread.join()
    listener.close()


def connect(address: tuple[str, int], count: int) -> None:
    """As many connections at once, with a message of 64 bytes each way."""
    connections = [socket.create_connection(address) for _ in range(count)]
    for connection in connections:
        connection.sendall(b"x" * 64)
    for connection in connections:
        connection.recv(64)
        connection.close()

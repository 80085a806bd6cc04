# SPDX-License-Identifier: Apache-2.0
"""A message of 120 bytes and its answer between two processes, over what connections might use.

``python -m benchmarks.bench_round_trip``: sockets with epoll (Unix and TCP), asyncio, and ZeroMQ
where pyzmq is installed. Each answers from a loop in another process; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import socket
import statistics
import time
from collections.abc import Callable

MESSAGE = b"x" * 120


def timed(call: Callable[[], object], count: int) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def echo_by_epoll(sock: socket.socket) -> None:
    epoll = select.epoll()
    epoll.register(sock.fileno(), select.EPOLLIN)
    while True:
        epoll.poll()
        data = sock.recv(4096)
        if not data:
            os._exit(0)
        sock.send(data)


def by_epoll(pair: tuple[socket.socket, socket.socket], count: int) -> float:
    ours, theirs = pair
    if os.fork() == 0:
        ours.close()
        echo_by_epoll(theirs)
    theirs.close()
    epoll = select.epoll()
    epoll.register(ours.fileno(), select.EPOLLIN)

    def round_trip() -> None:
        ours.send(MESSAGE)
        epoll.poll()
        ours.recv(4096)

    with ours:
        return timed(round_trip, count)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def by_asyncio(count: int) -> float:
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()

        async def echo() -> None:
            reader, writer = await asyncio.open_unix_connection(sock=theirs)
            while data := await reader.read(4096):
                writer.write(data)
            os._exit(0)

        asyncio.run(echo())
    theirs.close()

    async def ask_often() -> float:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            writer.write(MESSAGE)
            await reader.readexactly(len(MESSAGE))
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    return asyncio.run(ask_often())


def by_zeromq(count: int) -> float | None:
    try:
        import zmq
    except ImportError:
        return None
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        router = zmq.Context().socket(zmq.ROUTER)
        theirs.sendall(router.bind_to_random_port("tcp://127.0.0.1").to_bytes(4, "big"))
        for _ in range(count):
            router.send_multipart(router.recv_multipart())
        theirs.recv(1)
        os._exit(0)
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{int.from_bytes(ours.recv(4), 'big')}")

    def round_trip() -> None:
        dealer.send(MESSAGE)
        dealer.recv()

    result = timed(round_trip, count)
    ours.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    count = parser.parse_args().count
    results = {
        "epoll, Unix socket": by_epoll(socket.socketpair(), count),
        "epoll, TCP": by_epoll(tcp_pair(), count),
        "asyncio, Unix socket": by_asyncio(count),
        "ZeroMQ, TCP": by_zeromq(count),
    }
    for name, us in results.items():
        print(f"{name:22s} " + ("not installed" if us is None else f"{us:6.0f} us"))


if __name__ == "__main__":
    main()

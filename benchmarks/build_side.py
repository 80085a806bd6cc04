# SPDX-License-Identifier: Apache-2.0
"""One build of this library as ``compare_builds`` measures it; run with that build on PYTHONPATH.

It uses the reference's API only, which all builds have. It reads the name of a case per line, and
answers with a line of JSON: the microseconds of each call."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

import llm_datadist_torch as ld

KIB = 1024
ME, OWNER, FIRST_PEER = 1, 2, 100
BEHIND = 1 << 30  # bytes of the pull that others run beside
SWEEP = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB)
PEERS = (1, 16, 128)
BYTES = 256 << 20
TIMEOUT_MS = 60_000

Measure = Callable[[], list[float]]
"""Measures once more: microseconds of each call."""

_context = multiprocessing.get_context("spawn")


def start(cluster_id: int, *, remote: bool = False, **options: str) -> ld.LLMDataDist:
    config = ld.LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote
    config.device = "cpu"
    config.listen_ip_info = "127.0.0.1:0"
    config.sync_kv_timeout = TIMEOUT_MS
    datadist = ld.LLMDataDist(ld.LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options() | options)
    return datadist


def link(datadist: ld.LLMDataDist, ports: dict[int, int]) -> None:
    infos = []
    for peer, port in ports.items():
        info = ld.LLMClusterInfo()
        info.remote_cluster_id = peer
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info("127.0.0.1", port)
        infos.append(info)
    status, answers = datadist.link_clusters(infos, TIMEOUT_MS)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"no link: {answers}")


def desc(tensors: int, blocks: int, nbytes: int) -> ld.CacheDesc:
    return ld.CacheDesc(tensors, [blocks, nbytes], ld.DataType.DT_UINT8)


def own(pipe: Connection) -> None:
    """The other process: starts instances and caches as it is told."""
    instances: list[Any] = []
    kept: list[Any] = []
    while (order := pipe.recv()) is not None:
        name, arguments = order
        if name == "start":
            instances.append(start(arguments[0], **arguments[1]))
            pipe.send(instances[-1].listen_address[1])
        elif name == "allocate":
            manager, key = instances[-1].cache_manager, ld.BlocksCacheKey(OWNER, arguments[0])
            kept.append(manager.allocate_blocks_cache(desc(*arguments[1:]), key))
            pipe.send(None)
        elif name == "register":
            manager, key = instances[-1].cache_manager, ld.BlocksCacheKey(OWNER, arguments[0])
            tensors, blocks, nbytes = arguments[1:]
            kept.append([torch.zeros(blocks, nbytes, dtype=torch.uint8) for _ in range(tensors)])
            addresses = [tensor.data_ptr() for tensor in kept[-1]]
            manager.register_blocks_cache(desc(*arguments[1:]), addresses, key)
            pipe.send(None)
        elif name == "busy":
            kept.append(busy := threading.Event())
            threading.Thread(target=compute, args=(busy,), daemon=True).start()
            pipe.send(None)
        else:
            for instance in instances:
                instance.finalize()
            instances.clear()
            pipe.send(None)


def compute(ended: threading.Event) -> None:
    """Pure Python, as a scheduler or a tokenizer computes."""
    value = 0
    while not ended.is_set():
        for number in range(1000):
            value = (value + number * number) % 1_000_003


class Owner:
    """The other process, as seen from here."""

    def __init__(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=own, args=(theirs,), daemon=True)
        self._process.start()

    def __call__(self, name: str, *arguments: object) -> Any:  # noqa: ANN401
        self._pipe.send((name, arguments))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(10)
        self._process.kill()


class Pair:
    """An owner with one blocks cache, and an instance linked with it that has room for it."""

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 4 * KIB),
        memory: str = "allocate",
        *,
        remote: bool = False,
        busy: bool = False,
        **options: str,
    ) -> None:
        self.owner = Owner()
        port = self.owner("start", OWNER, {"remote": remote, **options})
        self.owner(memory, 0, *shape)
        self.datadist = start(ME, remote=remote, **options)
        self.manager = self.datadist.cache_manager
        self.cache = self.manager.allocate_blocks_cache(desc(*shape))
        link(self.datadist, {OWNER: port})
        if busy:
            self.owner("busy")

    def pull(self, blocks: int = 1) -> None:
        ids = list(range(blocks))
        self.manager.pull_blocks(ld.BlocksCacheKey(OWNER, 0), self.cache, ids, ids[::-1])

    def close(self) -> None:
        self.datadist.finalize()
        self.owner.close()


def timed(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds of each of so many calls."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return times


def one_block(
    stack: ExitStack,
    count: int,
    **setup: Any,  # noqa: ANN401
) -> Measure:
    pair = stack.enter_context(closing(Pair(**setup)))
    timed(pair.pull, 200)
    return lambda: timed(pair.pull, count)


def beside(stack: ExitStack) -> Measure:
    """One-block pulls while another thread pulls BEHIND bytes over the same link."""
    pair = stack.enter_context(closing(Pair((2, 8, BEHIND // 16), remote=True)))
    pair.owner("allocate", 1, 1, 8, 4 * KIB)
    room = pair.manager.allocate_blocks_cache(desc(1, 8, 4 * KIB))
    key = ld.BlocksCacheKey(OWNER, 1)

    def pull() -> None:
        pair.manager.pull_blocks(key, room, [0], [1])

    def measure() -> list[float]:
        thread = threading.Thread(target=pair.pull, args=(8,))
        thread.start()
        times: list[float] = []
        while thread.is_alive():
            times += timed(pull, 1)
        return times

    pull()
    measure()
    return measure


def many(stack: ExitStack, nbytes: int) -> Measure:
    blocks = min(128, BYTES // nbytes)
    tensors = min(64, max(1, BYTES // (blocks * nbytes)))
    pair = stack.enter_context(closing(Pair((tensors, blocks, nbytes))))
    timed(lambda: pair.pull(blocks), 2)
    return lambda: timed(lambda: pair.pull(blocks), 3)


def linking(stack: ExitStack, count: int) -> Measure:
    """Set-up of links with instances of another process, by an instance that is new each time."""
    owner = stack.enter_context(closing(Owner()))
    ports = {
        FIRST_PEER + number: owner("start", FIRST_PEER + number, {}) for number in range(count)
    }

    def measure() -> list[float]:
        datadist = start(ME)
        times = timed(lambda: link(datadist, ports), 1)
        datadist.finalize()
        return times

    measure()
    return measure


CASES: dict[str, Callable[[ExitStack], Measure]] = {
    "two-sided": partial(one_block, count=300),
    "known": partial(one_block, count=1000, remote=True),
    "registered": partial(one_block, count=300, memory="register", remote=True),
    "busy": partial(one_block, count=150, busy=True),
    "nixl": partial(one_block, count=50, **{"llm.Transport": "nixl"}),
    "beside": beside,
    **{f"many-{nbytes}": partial(many, nbytes=nbytes) for nbytes in SWEEP},
    **{f"link-{count}": partial(linking, count=count) for count in PEERS},
}


def main() -> None:
    set_up, measure = "", list
    print(json.dumps(ld.__file__), flush=True)
    with ExitStack() as stack:
        for line in sys.stdin:
            case = line.strip()
            if case != set_up:
                stack.close()
                set_up, measure = case, CASES[case](stack)
            print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()

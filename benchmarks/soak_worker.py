# SPDX-License-Identifier: Apache-2.0
"""One process of the soak: an instance, and threads that do one random operation after another.

Whatever arrives is compared with what its owner is known to have written: every word of every
block is different from every other word in the soak. A wrong one ends the soak.
"""

from __future__ import annotations

import collections
import ctypes
import logging
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, MutableSequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    EventSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.values.status import error_for

TENSORS, BLOCKS, WORDS = 4, 32, 2048
"""Of each blocks cache: 2 MiB, in blocks of 16 KiB."""
SLOTS = 8
"""Requests that one owner offers at a time."""
POOL = '{"memory_size": 67108864, "page_shift": 16}'
STATIC, INBOX = 0, 1
"""Kinds of published caches: one that never changes, and one per peer and thread to push to."""
MOVING = 1 << 40
"""Keys of caches that torch moves begin here."""
_SETTLE_S = 20.0

EXPECTED = {
    LLMStatusCode.LLM_NOT_YET_LINK,  # it was unlinked, or killed
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,  # a new process does not have it, or it was consumed
    LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_OUT_OF_MEMORY,  # of the pool
}
"""How an operation may end besides success."""


class WrongBytesError(Exception):
    """Bytes that a successful operation should not have delivered."""


@dataclass(frozen=True)
class Plan:
    """What one worker is to do.

    Attributes:
        number: Its cluster id, from 1.
        generation: Its how-manieth process it is.
        port: Where to listen; 0 for any port.
        workers: How many there are.
        threads: Of operations, each worker.
        seed: Of the operations.
        pause_s: Mean pause between two operations of a thread.
        options: Of its instance, besides those that the soak itself needs.
    """

    number: int
    generation: int
    port: int
    workers: int
    threads: int
    seed: int
    pause_s: float
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What came of a worker: how operations ended, the first error, and what was left over."""

    done: dict[str, int] = field(default_factory=dict)
    error: str = ""
    left: dict[str, int] = field(default_factory=dict)


def words_of(seed: int, tensor: int, blocks: torch.Tensor) -> torch.Tensor:
    """The words of some blocks, int64 [len(blocks), WORDS]; other seeds give other words."""
    base = ((seed * TENSORS + tensor) * BLOCKS + blocks) * WORDS
    return base[:, None] + torch.arange(WORDS)


def model_id(kind: int, generation: int, peer: int = 0, thread: int = 0) -> int:
    """The key of a published blocks cache; no two processes share one."""
    return ((generation * 16 + peer) * 16 + thread) * 2 + kind


def moving_seed(owner: int, serial: int) -> int:
    """Of the words in a cache that torch moves."""
    return (1000 + owner) * 10**10 + serial


MOVES: dict[str, Callable[[torch.Tensor], object]] = {
    "data": lambda tensor: setattr(tensor, "data", torch.zeros_like(tensor)),
    "set": lambda tensor: tensor.set_(torch.zeros_like(tensor)),
    "share_memory": lambda tensor: tensor.share_memory_(),
}
"""What replaces the memory of a tensor."""


def slots_of(plan: Plan) -> range:
    """What one worker writes on the board: requests that it offers; then, per thread, a cache.

    The cache is one of which torch moves a tensor: its serial number, negative once that has moved,
    0 for none.
    """
    each = SLOTS + plan.threads
    return range((plan.number - 1) * each, plan.number * each)


def board_size(workers: int, threads: int) -> int:
    return workers * (SLOTS + threads)


class Worker:
    """An instance, its published caches, and the operations."""

    def __init__(self, plan: Plan, board: MutableSequence[int]) -> None:
        self.plan, self.board = plan, board
        self.stop = threading.Event()
        self.done: collections.Counter[str] = collections.Counter()
        self.error = ""
        self.peers: dict[int, tuple[int, int]] = {}  # number -> (port, generation)
        self.requests = plan.generation * 1_000_000
        self.slots = threading.Lock()
        config = LLMConfig()
        config.enable_cache_manager = True
        config.device = "cpu"
        config.listen_ip_info = f"127.0.0.1:{plan.port}"
        config.sync_kv_timeout = 5000
        config.mem_pool_cfg = POOL
        self.datadist = LLMDataDist(LLMRole.MIX, plan.number)
        options = config.generate_options()
        self.datadist.init(options | dict(plan.options))
        self.manager = self.datadist.cache_manager
        self.desc = CacheDesc(TENSORS, [BLOCKS, WORDS], DataType.DT_INT64)
        self.published = [self._publish(STATIC)]
        for peer in range(1, plan.workers + 1):
            for thread in range(plan.threads):
                self.published.append(self._publish(INBOX, peer, thread))

    def _publish(self, kind: int, peer: int = 0, thread: int = 0) -> Cache:
        plan = self.plan
        model = model_id(kind, plan.generation, peer, thread)
        cache = self.manager.allocate_blocks_cache(self.desc, BlocksCacheKey(plan.number, model))
        seed = plan.number * 1000 + plan.generation
        for number, tensor in enumerate(cache.tensors):
            tensor[:] = words_of(seed, number, torch.arange(BLOCKS))
        return cache

    def slots_of(self, number: int) -> range:
        return slots_of(replace(self.plan, number=number))

    def run_threads(self) -> None:
        self.threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(self.plan.threads)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        plan = self.plan
        rng = random.Random(f"{plan.seed} {plan.number} {plan.generation} {number}")
        operations = Operations(self, rng, number)
        while not self.stop.is_set():
            name, call = operations.choose()
            try:
                self.done[f"{name}: {call()}"] += 1
            except LLMException as error:
                self.done[f"{name}: {error.status_code.name}"] += 1
                if error.status_code not in EXPECTED:
                    self._fail(f"{name}: {error}")
                if error.status_code == LLMStatusCode.LLM_NOT_YET_LINK:
                    operations.link_soon()
            except Exception as error:  # noqa: BLE001 (whatever it is, the parent shows it)
                self._fail(f"{name}: {type(error).__name__}: {error}")
            time.sleep(rng.expovariate(1 / plan.pause_s) if plan.pause_s else 0)
        operations.close()

    def _fail(self, text: str) -> None:
        self.error = self.error or f"worker {self.plan.number}: {text}"
        self.stop.set()

    def finish(self) -> None:
        """No operation begins any more; those under way end."""
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                self.error = self.error or f"worker {self.plan.number}: an operation hangs"
        # Peers that lost a connection while we wrote keep the memory until a link says it is over.
        for peer in set(self.peers) - {self.plan.number}:
            self.datadist.link_clusters([self.cluster(peer)], 10_000)

    def cluster(self, peer: int) -> LLMClusterInfo:
        """The address of another worker."""
        info = LLMClusterInfo()
        info.remote_cluster_id = peer
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info("127.0.0.1", self.peers[peer][0])
        return info

    def cut(self, _: object) -> None:
        """All connections of links end, as by a reset in the network."""
        for link in self.datadist._instance.links.links():  # noqa: SLF001
            sock = link.connection._sock  # noqa: SLF001
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def hold_gil(self, seconds: float) -> None:
        """No other thread runs Python meanwhile: PyDLL keeps the GIL."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))

    def set_clock(self, seconds: int) -> None:
        """The clock of the day jumps."""
        before = time.time()
        ctypes.CDLL(None).set_clock_offset(ctypes.c_long(seconds))
        self.done[f"clock set {'back' if time.time() < before else 'forward'}"] += 1

    def left(self) -> dict[str, int]:
        """What is still held after everything was given back; waits a while for peers to do so."""
        for slot in range(SLOTS):
            self._withdraw(slot)
        for cache in self.published:
            self.manager.deallocate_blocks_cache(cache)
        self.published.clear()
        instance = self.datadist._instance  # noqa: SLF001
        end = time.monotonic() + _SETTLE_S
        while True:
            left = {
                "caches": len(instance.catalog),
                "keys": instance.catalog.num_keys,
                "grants": sum(len(link.grants) for link in instance.links.links()),
                "leases of late writers": instance.links.registry.late_writers.leases,
                "pool bytes": instance.memory(Placement.DEVICE)._arena.stats()[3],  # noqa: SLF001
            }
            if not any(left.values()) or time.monotonic() > end:
                return left
            time.sleep(0.05)

    def offer(self, rng: random.Random) -> str:
        """Offer a request for others to fetch, instead of the one that was in its slot."""
        with self.slots:
            slot = rng.randrange(SLOTS)
            self._withdraw(slot)
            self.requests += 1
            key = CacheKey(self.plan.number, self.requests)
            desc = CacheDesc(TENSORS, [1, BLOCKS * WORDS], DataType.DT_INT64)
            cache = self.manager.allocate_cache(desc, [key])
            seed = self.plan.number * 100_000_000 + self.requests
            for number, tensor in enumerate(cache.tensors):
                tensor[0] = words_of(seed, number, torch.arange(BLOCKS)).flatten()
            # From now on the key alone keeps it, until somebody has fetched it.
            self.manager.deallocate_cache(cache)
            self.board[slots_of(self.plan)[slot]] = self.requests
        return "done"

    def _withdraw(self, slot: int) -> None:
        place = slots_of(self.plan)[slot]
        if self.board[place]:
            self.manager.remove_cache_key(CacheKey(self.plan.number, self.board[place]))
            self.board[place] = 0


class Operations:
    """What one thread does; it has a cache of its own for what it fetches."""

    def __init__(self, worker: Worker, rng: random.Random, thread: int) -> None:
        self.worker, self.rng, self.thread = worker, rng, thread
        self.me, self.manager = worker.plan.number, worker.manager
        self.room = self.manager.allocate_blocks_cache(worker.desc)
        self.row = self.manager.allocate_cache(
            CacheDesc(TENSORS, [1, BLOCKS * WORDS], DataType.DT_INT64)
        )
        self.serial = 0
        self.wants_link = True

    def link_soon(self) -> None:
        """A peer was not linked: the next operation may be to link one."""
        self.wants_link = True

    def close(self) -> None:
        self.manager.deallocate_blocks_cache(self.room)
        self.manager.deallocate_cache(self.row)

    def choose(self) -> tuple[str, Callable[[], str]]:
        if self.wants_link and self.rng.random() < 0.5:
            self.wants_link = False
            return "link", lambda: self.link(self.a_peer())
        table: list[tuple[int, str, Callable[[], str]]] = [
            (30, "pull", self.pull),
            (20, "push", lambda: self.push(layerwise=False)),
            (15, "layerwise", lambda: self.push(layerwise=True)),
            (10, "offer", lambda: self.worker.offer(self.rng)),
            (15, "fetch", self.fetch),
            (10, "allocate", self.allocate),
            (5, "move", self.move),
            (10, "pull what moves", self.pull_what_moves),
            (2, "unlink", self.unlink),
            (3, "link", lambda: self.link(self.a_peer())),
        ]
        (chosen,) = self.rng.choices(table, [weight for weight, _, _ in table])
        return chosen[1:]

    def a_peer(self) -> int:
        return self.rng.choice([n for n in self.worker.peers if n != self.me])

    def some_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.rng.randint(1, BLOCKS)
        return (
            torch.tensor(self.rng.sample(range(BLOCKS), count)),
            torch.tensor(self.rng.sample(range(BLOCKS), count)),
        )

    def check(self, seed: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Blocks ``target`` here must be blocks ``source`` of what was written with ``seed``."""
        for number, tensor in enumerate(self.room.tensors):
            if not torch.equal(tensor[target], words_of(seed, number, source)):
                raise WrongBytesError(f"seed {seed}, tensor {number}, blocks {source.tolist()}")

    def pull(self) -> str:
        peer = self.a_peer()
        generation = self.worker.peers[peer][1]
        source, target = self.some_blocks()
        for tensor in self.room.tensors:
            tensor.zero_()
        key = BlocksCacheKey(peer, model_id(STATIC, generation))
        self.manager.pull_blocks(key, self.room, source, target)
        self.check(peer * 1000 + generation, source, target)
        return "done"

    def push(self, *, layerwise: bool) -> str:
        peer = self.a_peer()
        generation = self.worker.peers[peer][1]
        key = BlocksCacheKey(peer, model_id(INBOX, generation, self.me, self.thread))
        source, target = self.some_blocks()
        self.serial += 1
        seed = ((self.me * 16 + self.thread) * 1000 + self.worker.plan.generation) * 10**6
        seed += self.serial
        for number, tensor in enumerate(self.room.tensors):
            tensor[:] = words_of(seed, number, torch.arange(BLOCKS))
        if layerwise:
            self._send_layers(key, source, target)
        else:
            self.manager.push_blocks(key, self.room, source, target)
        for tensor in self.room.tensors:
            tensor.zero_()
        self.manager.pull_blocks(key, self.room, target, target)
        self.check(seed, source, target)
        return "done"

    def _send_layers(self, key: BlocksCacheKey, source: torch.Tensor, target: torch.Tensor) -> None:
        layers = range(TENSORS // 2)
        ready = EventSynchronizer([threading.Event() for _ in layers])
        config = TransferWithCacheKeyConfig(key, layers, layers)
        task = self.manager.transfer_cache_async(self.room, ready, [config], source, target)
        for layer in layers:
            ready.record(layer)
        (status,) = task.get_results()
        if status != LLMStatusCode.LLM_SUCCESS:
            raise error_for(status, "layer by layer")

    def fetch(self) -> str:
        """Fetch a request that somebody offers, at once or in halves; that consumes it."""
        peer = self.a_peer()
        slots = self.worker.slots_of(peer)
        request = self.worker.board[slots[self.rng.randrange(SLOTS)]]
        if not request:
            return "nothing offered"
        for tensor in self.row.tensors:
            tensor.zero_()
        halves = self.rng.choice([[None], [range(1), range(1, 2)]])
        for half in halves:
            self.manager.pull_cache(
                CacheKey(peer, request), self.row, src_layer_range=half, dst_layer_range=half
            )
        for number, tensor in enumerate(self.row.tensors):
            words = words_of(peer * 100_000_000 + request, number, torch.arange(BLOCKS))
            if not torch.equal(tensor[0], words.flatten()):
                raise WrongBytesError(f"request {request} of {peer}, tensor {number}")
        return "done"

    def allocate(self) -> str:
        """Allocate, copy blocks around, free."""
        cache = self.manager.allocate_blocks_cache(self.worker.desc)
        source, target = self.some_blocks()
        for number, tensor in enumerate(cache.tensors):
            tensor[:] = words_of(self.me, number, torch.arange(BLOCKS))
        self.manager.copy_blocks(cache, {int(s): [int(t)] for s, t in zip(source, target)})  # noqa: B905
        for number, tensor in enumerate(cache.tensors):
            if not torch.equal(tensor[target], words_of(self.me, number, source)):
                raise WrongBytesError(f"copied blocks of tensor {number}")
        self.manager.deallocate_blocks_cache(cache)
        return "done"

    def move(self) -> str:
        """Publish a cache, let torch move one of its tensors: it is used no more, by nobody."""
        me, place = self.worker, self.worker.slots_of(self.me)[SLOTS + self.thread]
        self.serial += 1
        serial = (me.plan.generation * 10**6 + self.serial) * 16 + self.thread
        key = BlocksCacheKey(self.me, MOVING + serial)
        allocated = self.rng.random() < 0.5
        how = self.rng.choice(["data", "set", *["share_memory"] * allocated])
        if allocated:
            cache = self.manager.allocate_blocks_cache(me.desc, key)
            tensors = cache.tensors
        else:
            tensors = [torch.empty(BLOCKS, WORDS, dtype=torch.int64) for _ in range(TENSORS)]
            cache = self.manager.register_blocks_cache(me.desc, tensors, key)
        # Of what the caller registers: it stays there while a peer may be reading it.
        old = [tensor.detach() for tensor in tensors]
        try:
            for number, tensor in enumerate(tensors):
                tensor[:] = words_of(moving_seed(self.me, serial), number, torch.arange(BLOCKS))
            me.board[place] = serial
            time.sleep(self.rng.random() * 0.2)
            MOVES[how](tensors[self.rng.randrange(TENSORS)])
            me.board[place] = -serial
            try:
                self.manager.copy_blocks(cache, {0: [1]})
            except LLMException as error:
                if "has moved" not in str(error):
                    raise
            else:
                raise WrongBytesError(f"a cache was copied from although torch has moved it: {how}")
            time.sleep(self.rng.random() * 0.2)
        finally:
            me.board[place] = 0
            if allocated:
                self.manager.deallocate_blocks_cache(cache)
            else:
                self.manager.unregister_cache(cache.cache_id)
            del old
        return "done"

    def pull_what_moves(self) -> str:
        """Pull a cache of which torch moves a tensor: the bytes of before, or an error."""
        peer = self.a_peer()
        thread = self.rng.randrange(self.worker.plan.threads)
        serial = self.worker.board[self.worker.slots_of(peer)[SLOTS + thread]]
        if not serial:
            return "nothing there"
        source, target = self.some_blocks()
        self.manager.pull_blocks(
            BlocksCacheKey(peer, MOVING + abs(serial)), self.room, source, target
        )
        if serial < 0:
            raise WrongBytesError(
                f"cache {serial} of {peer} was pulled although torch has moved it"
            )
        self.check(moving_seed(peer, serial), source, target)
        return "done"

    def link(self, peer: int) -> str:
        return self.worker.datadist.link_clusters([self.worker.cluster(peer)], 3000)[1][0].name

    def unlink(self) -> str:
        peer, force = self.a_peer(), self.rng.random() < 0.3
        clusters = [self.worker.cluster(peer)]
        ended = self.worker.datadist.unlink_clusters(clusters, 3000, force=force)[1][0].name
        time.sleep(self.rng.random() * 0.05)
        return f"{ended}, then {self.link(peer)}"


def serve(pipe: Connection, plan: Plan, board: MutableSequence[int]) -> None:
    """The process: does what the parent says, one command after the other."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    logging.getLogger("llm_datadist_torch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    worker = Worker(plan, board)
    pipe.send(worker.datadist.listen_address[1])
    with suppress(EOFError, ConnectionError):
        while True:
            command, argument = pipe.recv()
            if command == "peers":
                worker.peers = argument
            elif command == "run":
                worker.run_threads()
            elif command in ("cut", "hold_gil", "set_clock"):
                getattr(worker, command)(argument)
            elif command == "report":
                pipe.send(Report(dict(worker.done), worker.error))
            elif command == "finish":
                worker.finish()
                pipe.send("finished")
            elif command == "left":
                pipe.send(Report(dict(worker.done), worker.error, worker.left()))
            else:
                worker.datadist.finalize()
                pipe.send("ended")

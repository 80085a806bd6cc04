# SPDX-License-Identifier: Apache-2.0
"""The prefill and the decode process of `pd_generate.py`: what runs inside each of them.

Each process is one node with one blocks cache.  It takes messages from its inbox
and sends events to the router; keys and values never pass through these queues, the library moves
them from cache to cache.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import torch
from paged_model import (
    BlockAllocator,
    PagedCache,
    block_shape,
    blocks_for,
    decode,
    load_config,
    load_model,
    prefill,
)
from pd_fleet import Event, Settings

import llm_datadist_torch as ld

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from typing_extensions import Self

NAME = "kv"  # of the cache that each prefill process has
PROGRESS_TOKENS = 64


class Instance:
    """One process's model, node and blocks cache; a context manager.

    Args:
        role: prefill or decode.
        cluster_id: its name among the instances.
        place: number of the process; where there are several NPUs each takes the next one.
        settings: what is the same for every process.
    """

    def __init__(
        self, role: Literal["prefill", "decode"], cluster_id: int, place: int, settings: Settings
    ) -> None:
        self.cluster_id = cluster_id
        self.node = ld.open(
            cluster_id=cluster_id,
            role=role,
            device=settings.device,
            device_id=place % max(1, torch.accelerator.device_count()),
            # Port 0: any free one. Nobody links to a decode process, but HIXL needs an address.
            listen="127.0.0.1:0",
        )
        config = load_config()
        self.cache = self.node.allocate(
            layers=config.num_hidden_layers,
            blocks=settings.num_blocks,
            shape=block_shape(config),
            dtype=torch.float32,
            name=NAME,
        )
        # Wherever the library has put the cache.
        self.device = self.cache.device
        self.model = load_model(device=self.device)
        self.bytes_per_block = self.cache.nbytes // settings.num_blocks
        self.peers: dict[int, ld.Peer] = {}  # by cluster id
        self.pulled_from: set[int] = set()  # cluster ids

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.node.close()


def receive(inbox: Queue[Any], timeout_s: float) -> tuple[str, Any]:
    """Waits for the router's next message, (kind, data), as long as there is a router."""
    router = multiprocessing.parent_process()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            kind, data = inbox.get(timeout=1.0)
        except queue.Empty:
            if router is not None and not router.is_alive():
                raise RuntimeError("the router is gone") from None
        else:
            return kind, data
    raise TimeoutError(f"no message from the router in {timeout_s:g} s")


def prefill_process(
    name: str, number: int, settings: Settings, inbox: Queue[Any], events: Queue[Any]
) -> None:
    """Reads prompts into blocks and keeps each one's blocks until the decode side has them."""
    with Instance("prefill", 1 + number, number, settings) as instance:
        allocator = BlockAllocator(range(settings.num_blocks))
        held: dict[int, PagedCache] = {}
        waiting: deque[dict[str, Any]] = deque()
        events.put(Event(name, "ready", describe(instance, instance.node.address)))
        while True:
            kind, data = receive(inbox, settings.timeout_s)
            if kind == "stop":
                return
            if kind == "release":
                held.pop(data).release()
            else:
                waiting.append(data)
            # A prompt waits while others hold the blocks it needs; if none do, it is too long.
            while waiting and (
                not held or blocks_for(len(waiting[0]["prompt"])) <= allocator.num_free
            ):
                job = waiting.popleft()
                kv = PagedCache(instance.cache.tensors, allocator)
                began = time.monotonic()
                first = prefill(instance.model, kv, job["prompt"])
                # Whoever is told of the blocks may pull them at once. They are written: to read
                # the first token, prefill has waited for the device.
                answer = {
                    "request": job["request"],
                    "first_token": first,
                    "length": len(job["prompt"]),
                    "blocks": list(kv.blocks),
                    "seconds": time.monotonic() - began,
                    "at": time.monotonic(),
                    "digest": kv.digest(),
                }
                held[job["request"]] = kv
                events.put(Event(name, "prefilled", answer))


def decode_process(
    name: str, number: int, settings: Settings, inbox: Queue[Any], events: Queue[Any]
) -> None:
    """Links to the prefill processes, pulls the blocks of each request and continues its text."""
    place = settings.num_prefill + number
    with Instance("decode", 101 + number, place, settings) as instance:
        # From the top and shuffled: no block has the number that it had on the prefill side,
        # except by chance, so what is decoded depends on every block arriving where it should.
        order = list(range(settings.num_blocks))
        random.Random(number).shuffle(order)
        order.sort(key=lambda block: block < settings.num_blocks // 2)
        allocator = BlockAllocator(order)
        events.put(Event(name, "ready", describe(instance, instance.node.address)))
        while True:
            kind, data = receive(inbox, settings.timeout_s)
            if kind == "stop":
                break
            if kind == "link":
                peer = instance.node.connect(data)
                instance.peers[peer.cluster_id] = peer
                events.put(Event(name, "linked", {"cluster_id": peer.cluster_id}))
            else:
                continue_text(name, instance, allocator, settings, data, events)
        for peer in instance.peers.values():
            peer.disconnect()


def describe(instance: Instance, address: str | None) -> dict[str, Any]:
    """Returns what the router shows of a process that has started."""
    return {
        "pid": os.getpid(),
        "cluster_id": instance.cluster_id,
        "address": address,
        "num_blocks": instance.cache.cache_desc.shape[0],
        "block_size": instance.cache.cache_desc.shape[1],
        "num_tensors": instance.cache.cache_desc.num_tensors,
        "bytes_per_block": instance.bytes_per_block,
        "device": str(instance.device),
    }


def continue_text(
    name: str,
    instance: Instance,
    allocator: BlockAllocator,
    settings: Settings,
    job: dict[str, Any],
    events: Queue[Any],
) -> None:
    """Pulls one request's blocks into our own ones and generates the rest of its tokens."""
    kv = PagedCache(instance.cache.tensors, allocator, length=job["length"])
    began = time.monotonic()
    instance.peers[job["cluster_id"]].pull(NAME, instance.cache, job["blocks"], kv.blocks)
    seconds = time.monotonic() - began
    if settings.damage:
        for tensor in instance.cache.tensors:
            tensor[kv.blocks] = 0
    pulled = {
        "request": job["request"],
        "src_blocks": job["blocks"],
        "dst_blocks": list(kv.blocks),
        "nbytes": len(kv.blocks) * instance.bytes_per_block,
        "seconds": seconds,
        "digest": kv.digest(),
        "is_first": job["cluster_id"] not in instance.pulled_from,
    }
    instance.pulled_from.add(job["cluster_id"])
    events.put(Event(name, "pulled", pulled))
    tokens = [job["first_token"]]
    began = time.monotonic()
    for token in decode(instance.model, kv, tokens[0], job["count"] - 1):
        tokens.append(token)
        if len(tokens) % PROGRESS_TOKENS == 0 and len(tokens) < job["count"]:
            progress = {"request": job["request"], "tokens": len(tokens)}
            events.put(Event(name, "progress", progress))
    done = {"request": job["request"], "tokens": tokens, "seconds": time.monotonic() - began}
    kv.release()
    events.put(Event(name, "done", done))

# SPDX-License-Identifier: Apache-2.0
"""Pulls between two hosts, which are network namespaces of one machine (``benchmarks.hosts``)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import llm_datadist_torch as ld
from benchmarks import hosts as two_hosts
from benchmarks.cases import NotHereError, Plan
from benchmarks.cases.transfers import SIZES, effort_of, shape_of, transfer
from benchmarks.measuring import KIB
from benchmarks.owner import TIMEOUT_S, Owner
from benchmarks.peers import Call, PeerFailedError, Shape

BYTES = 64 << 20  # of a transfer, at most
DELAYS_US = (0, 100, 1000)
TICK_S = 0.0005
TICKED = ("relay", "over nixl, TCP", "TCP stream")


def hosts(plan: Plan) -> list[dict[str, Any]]:
    """Over a pair of veth: one 4 KiB block, then each size; scattered, and in runs of 16."""
    sizes = plan.sweep or SIZES
    shapes = [Shape(4 * KIB, 1, 1, 1)]
    shapes += [shape_of(size, 1, tiny=plan.tiny, most=BYTES) for size in sizes]
    runs = [size for size in sizes if size <= 64 * KIB]
    shapes += [shape_of(size, 16, tiny=plan.tiny, most=BYTES) for size in runs]
    return on_hosts(plan, None, shapes)


def latency(plan: Plan) -> list[dict[str, Any]]:
    """One 4 KiB block and 64 MiB: over veth, and through the forwarder with each delay."""
    if reason := two_hosts.why_no_delay():
        raise NotHereError(reason)
    shapes = [Shape(4 * KIB, 1, 1, 1), shape_of(64 * KIB, 1, tiny=plan.tiny, most=BYTES)]
    points = on_hosts(plan, None, shapes, wire="veth")
    for delay_us in plan.sweep or (DELAYS_US[1:2] if plan.tiny else DELAYS_US):
        delay_ms = delay_us / 1000
        points += on_hosts(plan, delay_ms, shapes, wire=f"forwarder, {delay_ms:g} ms")
    return points


def on_hosts(
    plan: Plan, delay_ms: float | None, shapes: Sequence[Shape], wire: str = ""
) -> list[dict[str, Any]]:
    """Points that are measured by a process that is a host of its own.

    Raises:
        NotHereError: There can't be two hosts.
    """
    if reason := two_hosts.why_no_hosts():
        raise NotHereError(reason)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # `show` stays here: it may be anything.
    args = (theirs, replace(plan, show=no_show), delay_ms, list(shapes), wire)
    process = context.Process(target=near_host, args=args)
    process.start()
    theirs.close()
    points = []
    try:
        while (got := ours.recv()) is not None:
            if isinstance(got, str):
                raise SystemExit(f"bench: the process of the near host failed:\n{got}")
            points.append(got)
            plan.show(got)
        process.join(30)
    except EOFError:
        raise SystemExit("bench: the process of the near host has ended") from None
    finally:
        process.kill()
    return points


def no_show(_point: dict[str, Any]) -> None:
    """Shows nothing."""


def near_host(
    pipe: Connection, plan: Plan, delay_ms: float | None, shapes: Sequence[Shape], wire: str
) -> None:
    """The process that pulls; the owner is a child of it."""
    try:
        # Both processes see one machine: without this, UCX finds shared memory around the wire.
        os.environ["UCX_TLS"] = "tcp"
        # gloo's store warns that no name server knows the hosts.
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        two_hosts.leave()
        peers = [peer for peer in plan.peers if 2 in peer.hosts]
        with (
            closing(two_hosts.Wire(delay_ms)) as cable,
            closing(Owner(cable)) as owner,
            ld.open(timeout_s=TIMEOUT_S) as node,
        ):
            for shape in shapes:
                effort = effort_of(plan, shape)
                found = transfer(peers, owner, node, shape, effort, push=False, examine=examine)
                if wire:
                    found["at"] = {"wire": wire} | found["at"]
                pipe.send(found)
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def examine(calls: Mapping[str, Call], shape: Shape) -> dict[str, float]:
    """See that all bytes of each call go over the wire, and for how long one holds up Python.

    Raises:
        SystemExit: Some bytes have gone around it.
    """
    gaps = {}
    for name, call in calls.items():
        before = two_hosts.carried()
        with suppress(PeerFailedError), ticker() as found:
            call()
            if two_hosts.carried() - before < shape.nbytes:
                raise SystemExit(f"bench: not all bytes of {name} go over the wire")
        if name in TICKED and found:
            gaps[f"{name}: longest gap, ms"] = max(found) * 1e3
    return gaps


@contextmanager
def ticker() -> Iterator[list[float]]:
    """Meanwhile a thread naps again and again; yields the seconds by which each nap was too long.

    A call that holds the GIL makes them long, and so does a machine whose cores are all busy.
    """
    late: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            began = time.perf_counter()
            time.sleep(TICK_S)
            late.append(time.perf_counter() - began - TICK_S)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    yield late
    done.set()
    thread.join()

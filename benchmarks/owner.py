# SPDX-License-Identifier: Apache-2.0
"""The owner's process: it has the memory that others pull from and push to."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

import llm_datadist_torch as ld
from benchmarks import hosts
from benchmarks.peers import LOCALHOST, Memory, Shape, all_peers

TIMEOUT_S = 60.0


@contextmanager
def memory_of(
    node: ld.Node, shape: Shape, *, owner: bool, host: str = LOCALHOST
) -> Iterator[Memory]:
    """The memory of one side; the owner's has two caches, with the same random bytes."""
    allocated = node.allocate(
        layers=shape.tensors,
        tensors_per_layer=1,
        blocks=shape.pool,
        shape=(shape.block_bytes,),
        dtype=torch.uint8,
        name="allocated" if owner else None,
    )
    registered = None
    if owner:
        for tensor in allocated.tensors:
            tensor.random_()
        tensors = [tensor.clone() for tensor in allocated.tensors]
        registered = node.register(tensors, tensors_per_layer=1, name="registered")
    else:
        for tensor in allocated.tensors:
            tensor.zero_()
    yield Memory(node, shape, allocated, registered, host)
    node.free(allocated)
    if registered is not None:
        node.free(registered)


def own(pipe: Connection, *, apart: bool) -> None:
    """The process: offers memory of each shape that it is told, until it is told None.

    Args:
        pipe: To the other process.
        apart: Whether it is a host of its own.
    """
    try:
        host = hosts.FAR if apart else LOCALHOST
        if apart:
            hosts.leave()
            pipe.send(os.getpid())
            pipe.recv()  # the devices are there
            hosts.set_up(host)
        with ld.open(listen=f"{host}:0", timeout_s=TIMEOUT_S) as node:
            pipe.send(os.getpid())
            while (order := pipe.recv()) is not None:
                serve(node, pipe, host, *order)
                pipe.send("freed")
    except Exception:  # noqa: BLE001 (the other process shows it)
        pipe.send(traceback.format_exc())


def serve(node: ld.Node, pipe: Connection, host: str, shape: Shape, names: list[str]) -> None:
    """Be the owner of one shape, for the peers of these names."""
    with memory_of(node, shape, owner=True, host=host) as memory, ExitStack() as stack:
        peers = [peer for peer in all_peers() if peer.name in names]
        pipe.send({peer.name: stack.enter_context(peer.serve(memory)) for peer in peers})
        while (order := pipe.recv()) != "done":
            name, *arguments = order
            pipe.send((name, getattr(memory, name)(*arguments)))


class Owner:
    """This process's handle of the owner's process.

    Attributes:
        pid: Its process id.

    Args:
        wire: Connects this process's host with that of the owner's process; None where both are on
            this host.
    """

    def __init__(self, wire: hosts.Wire | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        apart = {"apart": wire is not None}
        self._process = context.Process(target=own, args=(theirs,), kwargs=apart, daemon=True)
        self._process.start()
        theirs.close()
        if wire is not None:
            wire.connect(self._get(int))
            self._pipe.send("connected")
        self.pid: int = self._get(int)

    @contextmanager
    def serving(self, shape: Shape, names: list[str]) -> Iterator[dict[str, Any]]:
        """Have memory of a shape there; yields what each peer offers."""
        self._pipe.send((shape, names))
        yield self._get(dict)
        self._pipe.send("done")
        self._get(str, "freed")

    def digest(self, kind: str, ids: torch.Tensor) -> int:
        """See :meth:`Memory.digest`."""
        self._pipe.send(("digest", kind, ids))
        return int(self._get(tuple)[1])

    def zero(self, kind: str) -> None:
        """See :meth:`Memory.zero`."""
        self._pipe.send(("zero", kind))
        self._get(tuple)

    def _get(self, wanted: type, text: str = "") -> Any:  # noqa: ANN401
        try:
            got = self._pipe.recv()
        except EOFError:
            raise SystemExit("bench: the owner's process has ended") from None
        if not isinstance(got, wanted) or (text and got != text):
            raise SystemExit(f"bench: the owner's process failed:\n{got}")
        return got

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
            self._process.join(10)
        self._process.kill()

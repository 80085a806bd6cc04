# SPDX-License-Identifier: Apache-2.0
"""What the tables of the API are run on: every transport and device there is, in both modes.

THE one list is ``SETUPS``: where there is an NPU, those on it, else those on the CPU. A further
transport is one more line there. One of somebody else's, installed from a package of its own, is
tested alone by ``LLMDD_TRANSPORT=name pytest tests/conformance`` (docs/adding_a_transport.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from llm_datadist_torch.transports.registry import known_transports
from tests.devices import on_npu
from tests.peers import NearPeer, Peer, Service

ME, PEER = 1, 2
_NEEDS = {"hixl": pytest.mark.needs_hixl, "nixl": pytest.mark.needs_nixl}
"""Transports that a machine may not have."""


@dataclass(frozen=True)
class Setup:
    """How two instances, 1 (in this process) and 2, move bytes.

    Attributes:
        transport: The transport between them.
        way: Which of its ways; a transport that has but one gives its own name.
        near: Instance 2 is in this process too, not in one of its own.
        kind: What a cache of the peer must be made of for this way (see ``Service.make``).
        device: Where caches of placement DEVICE are.
        remote: Remote-accessible mode, else two-sided.
    """

    transport: str
    way: str
    near: bool = False
    kind: str = "allocated"
    device: str = "cpu"
    remote: bool = False

    def __str__(self) -> str:
        mode = "remote-accessible" if self.remote else "two-sided"
        kind = "" if self.kind == "allocated" else f"-{self.kind}"
        return f"{self.transport}-{self.way}{kind}-{self.device}-{mode}"

    def link(self, here: Service, peer: Peer | NearPeer) -> None:
        """Start both instances and link them, so that bytes go this way."""
        options: dict[str, Any] = {"remote": self.remote, "device": self.device}
        if self.transport != "local":
            # On one host `local` would win.
            options["options"] = {"llm.Transport": self.transport}
        here.start(ME, **options)
        assert here.link(PEER, peer.call("start", PEER, **options))[0] == "LLM_SUCCESS"
        if self.way == "relay":
            here.only_relay(PEER)


def _modes(*setups: Setup) -> list[Setup]:
    return [replace(setup, remote=remote) for setup in setups for remote in (False, True)]


ON_CPU = _modes(
    Setup("local", "same-process", near=True),
    Setup("local", "shared-mapping"),
    Setup("local", "process-memory", kind="tensors"),
    Setup("local", "process-memory", kind="ints"),
    Setup("local", "relay"),
    Setup("nixl", "nixl"),
    Setup("nixl", "nixl", kind="tensors"),
)
ON_NPU = [
    *_modes(
        Setup("local", "same-process", near=True, device="npu"),
        Setup("local", "device-ipc", device="npu"),
        Setup("hixl", "hixl", device="npu"),
    ),
    # What is registered, in one of the modes each: on NPUs a test takes several times as long.
    Setup("local", "device-ipc", kind="tensors", device="npu", remote=True),
    Setup("local", "device-ipc", kind="ints", device="npu"),
    Setup("hixl", "hixl", kind="tensors", device="npu"),
    Setup("hixl", "hixl", kind="ints", device="npu", remote=True),
]


def of_others(name: str, device: str) -> list[Setup]:
    """An installed transport, with memory of every kind that it says it moves.

    Its ``move`` must return its name: that is how it is seen that the bytes went through it.
    """
    classes, broken = known_transports()
    if name not in classes:
        raise pytest.UsageError(broken.get(name, f"LLMDD_TRANSPORT={name}: it is not installed"))
    able = classes[name].capabilities
    if not (able.host_memory if device == "cpu" else able.device_memory):
        raise pytest.UsageError(f"LLMDD_TRANSPORT={name}: it does not move memory of {device}")
    kinds = ("allocated", "tensors", "ints")
    far = [Setup(name, name, kind=kind, device=device) for kind in kinds if able.same_host]
    near = [Setup(name, name, near=True, device=device)] if able.same_process else []
    return _modes(*near, *far)


SETUPS = ON_NPU if on_npu() else ON_CPU
if "LLMDD_TRANSPORT" in os.environ:
    SETUPS = of_others(os.environ["LLMDD_TRANSPORT"], "npu" if on_npu() else "cpu")
# What an answer says does not depend on the way, but on who answers: one setup of each is enough
# for tables without bytes.
ANSWERS = [setup for setup in SETUPS if setup.kind == "allocated" and setup.way != "relay"]
# The peer is another process; for what is about its life and its memory.
APART = [setup for setup in ANSWERS if not setup.near]


def params(setups: Iterable[Setup]) -> list[Any]:
    """Setups as parameters of a fixture or a test."""
    return [
        pytest.param(setup, id=str(setup), marks=_NEEDS.get(setup.transport, ()))
        for setup in setups
    ]


@dataclass
class Pair:
    """Instance 1 here, linked with instance 2 as a setup says."""

    setup: Setup
    here: Service
    there: Callable[..., Any]
    taken: list[str]

    def make(self, name: str, *args: Any, **kwargs: Any) -> int:
        """A cache at the peer, of the kind that this way needs."""
        return self.there("make", self.setup.kind, name, *args, **kwargs)

    def check_way(self) -> None:
        """All movements went the way that this test is about."""
        assert self.taken
        assert set(self.taken) == {self.setup.way}

# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the conformance tests: linked instances, on all setups that a table is meant for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llm_datadist_torch.transports.choice import LinkChannel
from tests.conformance.setups import ANSWERS, APART, SETUPS, Pair, Setup, params
from tests.peers import NearPeer, Peer, Service, spawn

Linked = tuple[Setup, Service, Any]


@pytest.fixture(scope="session")
def process() -> Iterator[Peer]:
    """One process, in which instances come and go."""
    peer = spawn()
    yield peer
    peer.close()


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that movements of this process took, in order."""
    taken: list[str] = []
    move = LinkChannel.move

    def recorded(self: LinkChannel, movement: object, deadline: object) -> str:
        taken.append(move(self, movement, deadline))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(LinkChannel, "move", recorded)
    return taken


EVERY_WAY = pytest.mark.parametrize("answering", params(SETUPS), indirect=True)
"""Runs a test that takes ``answering`` on every setup."""


@contextmanager
def linked_by(setup: Setup, process: Peer) -> Iterator[Linked]:
    here = Service()
    peer: Peer | NearPeer = NearPeer() if setup.near else process
    try:
        setup.link(here, peer)
        yield setup, here, peer
    finally:
        peer.call("finish")
        here.finish()


@pytest.fixture(params=params(SETUPS))
def pair(request: pytest.FixtureRequest, process: Peer, paths: list[str]) -> Iterator[Pair]:
    """For tables of bytes: every setup."""
    with linked_by(request.param, process) as (_, here, peer):
        yield Pair(request.param, here, peer.call, paths)


@pytest.fixture(params=params(ANSWERS))
def answering(request: pytest.FixtureRequest, process: Peer) -> Iterator[Linked]:
    """For tables of answers; ``EVERY_WAY`` makes it one for bytes."""
    with linked_by(request.param, process) as linked:
        yield linked


@pytest.fixture(params=params(APART))
def apart(request: pytest.FixtureRequest, process: Peer) -> Iterator[Linked]:
    """The peer is another process."""
    with linked_by(request.param, process) as linked:
        yield linked


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    """Makes further processes."""
    made: list[Peer] = []

    def make() -> Peer:
        made.append(spawn())
        return made[-1]

    yield make
    for peer in made:
        peer.close()

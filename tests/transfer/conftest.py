# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the transfer tests: this process's instance, peers, and which paths bytes took."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from llm_datadist_torch.transports.choice import LinkChannel
from tests.peers import Peer, Service, spawn
from tests.transfer import remote
from tests.transfer.helpers import OK, give_block


@pytest.fixture
def here() -> Iterator[Service]:
    """An instance in this process, to be started by the test."""
    service = Service()
    yield service
    service.finish()


@pytest.fixture
def services() -> Iterator[Callable[[], Service]]:
    """Makes further instances in this process."""
    made: list[Service] = []

    def make() -> Service:
        made.append(Service())
        return made[-1]

    yield make
    for service in made:
        service.finish()


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    """Makes processes."""
    made: list[Peer] = []

    def make() -> Peer:
        made.append(spawn())
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def remote_peer(here: Service, peers: Callable[[], Peer]) -> Peer:
    """A process, linked, with a painted blocks cache under THEIRS; and room for it here."""
    here.start(remote.ME, remote=True)
    other = peers()
    port = other.call("start", remote.PEER, remote=True)
    assert here.link(remote.PEER, port) == OK
    here.allocate("mine", *remote.SIZE, paged=True)
    other.call("allocate", "theirs", *remote.SIZE, paged=True, keys=remote.THEIRS)
    other.call("paint", "theirs", 7)
    return other


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that movements of this process took, in order."""
    taken: list[str] = []
    move = LinkChannel.move

    def recorded(self: LinkChannel, movement: object, deadline: object) -> str:
        way = move(self, movement, deadline)  # type: ignore[arg-type]
        taken.append(way)
        return way

    monkeypatch.setattr(LinkChannel, "move", recorded)
    return taken


@pytest.fixture
def pair(here: Service, services: Callable[[], Service]) -> tuple[Service, Service, int]:
    """Instances 1 and 2 in this process, not linked, each with a block; and the port of 2."""
    other = services()
    here.start(1)
    port = other.start(2)
    give_block(here, 1, 11)
    give_block(other, 2, 22)
    return here, other, port


@pytest.fixture
def two(here: Service, services: Callable[[], Service]) -> tuple[Service, Service]:
    """Instances 1 and 2 in this process, which do not listen, each with a block."""
    other = services()
    here.start(1, listen=None)
    other.start(2, listen=None)
    give_block(here, 1, 11)
    give_block(other, 2, 22)
    return here, other

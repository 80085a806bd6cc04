# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault tests: this process's instance, and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.peers import Peer, Service, spawn


@pytest.fixture
def here() -> Iterator[Service]:
    """An instance in this process, to be started by the test."""
    service = Service()
    yield service
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

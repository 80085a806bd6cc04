# SPDX-License-Identifier: Apache-2.0
"""Nodes for the tests of the front door: here, and in other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llm_datadist_torch as ld
from tests.front_door.service import NodeService
from tests.peers import Peer as Process
from tests.peers import spawn

OpenNode = Callable[..., ld.Node]


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LLM_DATADIST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def open_node() -> Iterator[OpenNode]:
    """``ld.open``, with a close in the end."""
    made: list[ld.Node] = []

    def make(**options: Any) -> ld.Node:
        made.append(ld.open(**options))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def processes() -> Iterator[Callable[[], Process]]:
    made: list[Process] = []

    def make() -> Process:
        made.append(spawn(NodeService))
        return made[-1]

    yield make
    for process in made:
        process.close()

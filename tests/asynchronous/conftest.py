# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of background work: this process's instance, and peers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from llm_datadist_torch import CacheTask
from llm_datadist_torch.links.work import Work
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.values.deadline import Deadline
from tests.asynchronous.helpers import PEER, WAIT_MS, Far
from tests.asynchronous.jobs import Job, Submit
from tests.peers import Peer, Service, spawn


@pytest.fixture
def here() -> Iterator[Service]:
    """Instance 1 in this process."""
    service = Service()
    service.start(1)
    yield service
    service.finish()


@pytest.fixture(scope="module")
def process() -> Iterator[Peer]:
    """A process that serves a whole module."""
    peer = spawn()
    yield peer
    peer.close()


@pytest.fixture
def far(here: Service, process: Peer) -> Iterator[Far]:
    """Instance 2 in another process, linked with ``here``."""
    assert here.link(PEER, process.call("start", PEER))[0] == "LLM_SUCCESS"
    yield Far(process)
    process.call("finish")


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


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool("test", 2)
    yield made
    made.close(Deadline.after_ms(WAIT_MS))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


@pytest.fixture
def submit(pool: WorkerPool) -> Submit:
    def start(job: Job, num_results: int = 1, **kwargs: object) -> CacheTask:
        work = Work(job, num_results, **kwargs)
        pool.submit(work)
        return CacheTask(work)

    return start

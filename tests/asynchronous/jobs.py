# SPDX-License-Identifier: Apache-2.0
"""Jobs that move nothing, for tests of what runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from llm_datadist_torch import CacheTask
from llm_datadist_torch.links.work import Work

Job = Callable[[Work], None]
Submit = Callable[..., CacheTask]


def succeed(work: Work) -> None:
    for index in range(len(work.results)):
        with work.step(index):
            work.succeed(index)


def wait_for(gate: threading.Event, entered: threading.Event | None = None) -> Job:
    def job(work: Work) -> None:
        if entered is not None:
            entered.set()
        assert gate.wait(60)
        work.check()
        succeed(work)

    return job

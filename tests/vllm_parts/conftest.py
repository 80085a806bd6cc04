# SPDX-License-Identifier: Apache-2.0
"""Workers that are closed when a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.vllm_parts.workers import Worker


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(*args: Any, **kwargs: Any) -> Worker:
        made.append(Worker(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.half.close()

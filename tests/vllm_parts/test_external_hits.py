# SPDX-License-Identifier: Apache-2.0
"""Tokens that vLLM has counted as external hits and that did not come, without vLLM."""

from __future__ import annotations

import pytest

from llm_datadist_torch.vllm import observing
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.scheduler.external_hits import ExternalHits


class Counted:
    """External hits with their record."""

    def __init__(self) -> None:
        self._record = Record()
        self.hits = ExternalHits(self._record)

    def take(self) -> int:
        """Tokens of failed loads since the last call."""
        return int(self._record.take()[observing.FAILED_TOKENS])


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_loads_that_fail_are_counted_by_their_blocks(counted: Counted) -> None:
    counted.hits.allocated("a", ((4, 5, 6),), 300)
    counted.hits.allocated("b", ((7, 8),), 129)
    counted.hits.failed(set(), {8})
    counted.hits.ended(["a", "b"])
    assert counted.take() == 129


def test_loads_that_fail_are_counted_by_their_requests(counted: Counted) -> None:
    """Blocks of two groups have the same numbers."""
    counted.hits.allocated("a", ((4, 5), (0, 4)), 64)
    counted.hits.allocated("b", ((5, 6), (0, 5)), 96)
    counted.hits.failed({"b"}, set())
    assert counted.take() == 96


def test_a_load_is_counted_once_however_many_workers_fail(counted: Counted) -> None:
    counted.hits.allocated("a", ((4, 5, 6),), 300)
    for blocks in ({5, 6}, {6}, {4, 5, 6}):
        counted.hits.failed(set(), blocks)
    counted.hits.ended(["a"])
    assert counted.take() == 300


def test_blocks_of_a_load_that_has_ended_are_of_others(counted: Counted) -> None:
    counted.hits.allocated("a", ((4, 5),), 64)
    counted.hits.ended(["a", "never heard of"])
    counted.hits.allocated("b", ((5, 6),), 33)
    counted.hits.failed(set(), {5})
    assert counted.take() == 33


def test_what_is_not_loaded_and_null_blocks_are_not_counted(counted: Counted) -> None:
    counted.hits.allocated("a", ((1, 2),), 64)
    # The second call of vLLM for a request, when its load has ended.
    counted.hits.ended(["a"])
    counted.hits.allocated("a", ((1, 2),), 0)
    counted.hits.allocated("b", ((0, 0, 3),), 96)
    counted.hits.failed({"of another connector"}, {0, 1, 2})
    assert counted.take() == 0

# SPDX-License-Identifier: Apache-2.0
"""Decode servers of two data-parallel ranks: the texts are those of one engine."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import eventually
from tests.vllm.serving import MODES, START_S, Serving

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]

HITS = re.compile(r'^vllm:external_prefix_cache_hits_total\{engine="(\d)".*\} ([\d.e+]+)$', re.M)


@pytest.fixture(params=MODES)
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path, request.param, "1", RANKS="2")
    try:
        assert eventually(made.is_ready, START_S), made.text()
        yield made
    finally:
        made.end()


def test_both_ranks_take_over_what_was_computed_elsewhere(serving: Serving) -> None:
    """One JSON serves both: their ids and ports follow their ranks."""
    serving.compare(serving.url("without a connector"))
    with urllib.request.urlopen(serving.url("decode0") + "/metrics", timeout=30) as answer:
        hits = {rank: float(count) for rank, count in HITS.findall(answer.read().decode())}
    assert sorted(hits) == ["0", "1"]
    assert min(hits.values()) > 0, hits

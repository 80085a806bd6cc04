# SPDX-License-Identifier: Apache-2.0
"""The simulation of a cluster against cases that were calculated by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulate_cluster import (
    Costs,
    Deployment,
    arithmetic,
    simulate_service,
    simulate_setup,
    study,
)

COSTS = Costs(
    dial_us=10,
    accept_us=30,
    ask_us=5,
    answer_us=20,
    wire_us=100,
    instance_kib=1024,
    dialed_kib=50,
    accepted_kib=20,
    dialed_fds=4,
    accepted_fds=1,
)


@pytest.mark.parametrize(
    ("prefill", "decode", "us"),
    [
        (1, 1, 10 + 100 + 30 + 100),
        # The dialer is done with the third after 30, and its owner with it after another 30.
        (3, 1, 3 * 10 + 100 + 30 + 100),
        # Four arrive at once at 110, and are answered one after the other.
        (1, 4, 10 + 100 + 4 * 30 + 100),
        # The first ones arrive everywhere at 110, the second ones at 120 and wait until 140.
        (2, 2, 10 + 100 + 2 * 30 + 100),
    ],
)
def test_setup(prefill: int, decode: int, us: float) -> None:
    assert simulate_setup(COSTS, Deployment(prefill, decode, 0)) * 1e6 == pytest.approx(us)


def test_a_pull_that_waits_for_nobody() -> None:
    # One in a hundred seconds: question 5, way 100, answer 20, way 100.
    result = simulate_service(COSTS, Deployment(1, 1, 0.01), 10_000, 1)
    assert result["pulls"] > 50
    assert result["p50_us"] == result["p99_us"] == pytest.approx(225)


def test_a_busy_owner_makes_pulls_wait() -> None:
    # 50 pullers, 800 pulls each: 40,000 a second of 20 us, which is 0.8 of the owner's time. The
    # formula of Pollaczek and Khinchine: on average 0.8 / 0.2 * 20 / 2 = 40 us in the queue.
    result = simulate_service(COSTS, Deployment(1, 50, 800), 2, 1)
    assert result["prefill_busy"] == pytest.approx(0.8, rel=0.02)
    assert 225 + 15 < result["p50_us"] < 225 + 40 < result["p99_us"]


def test_what_needs_no_simulation() -> None:
    assert arithmetic(COSTS, Deployment(10, 100, 7)) == {
        "links": 1000,
        "prefill_mib": (1024 + 100 * 20) / 1024,
        "decode_mib": (1024 + 10 * 50) / 1024,
        "prefill_fds": 100,
        "decode_fds": 40,
        "setup_messages": 2000,
        "pull_messages_per_s": 2100,
    }


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    case = {
        "links": 8, "warm_ms": 0.8, "pull_cpu_us": 5, "pull_owner_cpu_us": 20,
        "messages_per_setup": 2,
        "pull_messages": 3, "instance_kib": 1, "dialed_kib": 2, "accepted_kib": 3,
        "dialed_fds": 4, "accepted_fds": 1,
    }  # fmt: skip
    path = tmp_path / "links.json"
    path.write_text(json.dumps({"results": [case | {"links": 1}, case]}))
    costs = Costs.measured(path, 100)
    assert (costs.dial_us, costs.accept_us) == (100, 100)
    deployment = Deployment(5, 7, 50)
    assert study(costs, deployment, 2, 3) == study(costs, deployment, 2, 3)
    assert study(costs, deployment, 2, 3) != study(costs, deployment, 2, 4)
    assert study(replace(costs, answer_us=40), deployment, 2, 3) != study(costs, deployment, 2, 3)

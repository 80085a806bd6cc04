# SPDX-License-Identifier: Apache-2.0
"""A short soak, and that a soak notices what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from benchmarks.soak import Limits
from benchmarks.soak_worker import BLOCKS, Operations, WrongBytesError, words_of

pytestmark = pytest.mark.thorough


ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, secrets
from benchmarks import soak

result = soak.run(
    10,
    pause_s=0.004,
    disturb_every_s=1,
    sample_every_s=0.5,
    limits=soak.Limits(64, 32, 16),
    options={"llm.LinkSecret": secrets.token_urlsafe(32)},
)
print(json.dumps(result))
"""


def test_some_seconds_of_everything() -> None:
    """Growth over seconds is warming up: only what can't be is a failure here."""
    # In a process of its own, from which nothing has been forked yet: see ``jumping_clock``.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert len(result["disturbances"]) == 5
    for operation in ("pull", "push", "layerwise", "offer", "allocate", "move"):
        assert result["done"].get(f"{operation}: done", 0) > 0, result["done"]


def test_growth_is_noticed() -> None:
    flat = [{"pss_mib": 100.0, "rss_mib": 200.0, "fds": 20, "threads": 8} for _ in range(40)]
    assert soak.growth(flat) == {
        "pss_mib": (100, 100), "rss_mib": (200, 200), "fds": (20, 20), "threads": (8, 8)
    }  # fmt: skip
    leaking = [each | {"fds": 20 + number} for number, each in enumerate(flat)]
    early, late = soak.growth(leaking)["fds"]
    assert late - early == 20 > Limits().fds


def test_wrong_bytes_are_noticed() -> None:
    class Thread(Operations):
        def __init__(self) -> None:
            pass

    thread, every = Thread(), torch.arange(BLOCKS)
    thread.room = type("Room", (), {"tensors": [words_of(7, n, every) for n in range(4)]})()
    thread.check(7, every, every)
    thread.room.tensors[3][5, 9] += 1
    with pytest.raises(WrongBytesError, match="seed 7, tensor 3"):
        thread.check(7, every, every)
    with pytest.raises(WrongBytesError, match="seed 8"):
        thread.check(8, every[:1], every[:1])

# SPDX-License-Identifier: Apache-2.0
"""Missing synchronisations must show: that is what the simulator's schedulers are for."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes

pytestmark = pytest.mark.needs_torch_npu

RACES = "tests.race_checks"
SCHEDULERS = [("lazy",), ("random", "--seed", "1"), ("random", "--seed", "2"), ("inline",)]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: "".join(scheduler))
@pytest.mark.parametrize("check", check_names(RACES))
def test_races(check: str, scheduler: tuple[str, ...]):
    failure = outcomes(RACES, ("--scheduler", *scheduler))[check]
    assert not failure, failure

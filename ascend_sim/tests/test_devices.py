# SPDX-License-Identifier: Apache-2.0
"""torch_npu on the simulated runtime: correct programs are right under every scheduler."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes

pytestmark = pytest.mark.needs_torch_npu

DEVICES = "tests.device_checks"
SCHEDULERS = [("lazy",), ("random", "--seed", "1"), ("inline",)]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler[0])
@pytest.mark.parametrize("check", check_names(DEVICES))
def test_devices(check: str, scheduler: tuple[str, ...]):
    failure = outcomes(DEVICES, ("--scheduler", *scheduler))[check]
    assert not failure, failure


@pytest.mark.parametrize("check", check_names(DEVICES))
def test_devices_with_expandable_segments(check: str):
    setting = "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"
    failure = outcomes(DEVICES, setting=setting)[check]
    assert not failure, failure

# SPDX-License-Identifier: Apache-2.0
"""The kernels that serving engines call: ATB's operations, fused attention, norms."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes

CHECKS = "tests.inference_checks"


@pytest.mark.needs_torch_npu
@pytest.mark.parametrize("scheduler", ["lazy", "random"])
@pytest.mark.parametrize("check", check_names(CHECKS))
def test_inference(check: str, scheduler: str):
    options = ("--scheduler", scheduler, *(("--seed", "5") if scheduler == "random" else ()))
    failure = outcomes(CHECKS, options)[check]
    assert not failure, failure

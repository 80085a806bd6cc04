# SPDX-License-Identifier: Apache-2.0
"""The kernels that serving engines call: ATB's operations, fused attention, norms."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes

OPERATIONS = "tests.inference_checks"
ATTENTION = "tests.attention_checks"
EXPERTS = "tests.experts_checks"


def passes(module: str, check: str, *options: str) -> None:
    failure = outcomes(module, options)[check]
    assert not failure, failure


@pytest.mark.needs_torch_npu
@pytest.mark.parametrize("scheduler", [("lazy",), ("random", "--seed", "5")], ids=lambda s: s[0])
@pytest.mark.parametrize("check", check_names(OPERATIONS))
def test_operations(check: str, scheduler: tuple[str, ...]):
    passes(OPERATIONS, check, "--scheduler", *scheduler)


@pytest.mark.needs_torch_npu
@pytest.mark.parametrize("check", check_names(ATTENTION))
def test_attention(check: str):
    passes(ATTENTION, check)


@pytest.mark.needs_torch_npu
@pytest.mark.parametrize("check", check_names(EXPERTS))
def test_experts(check: str):
    passes(EXPERTS, check)

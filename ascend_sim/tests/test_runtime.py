# SPDX-License-Identifier: Apache-2.0
"""The simulated AscendCL without torch."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes

pytestmark = pytest.mark.needs_torch_npu

RUNTIME = "tests.runtime_checks"


@pytest.mark.parametrize("check", check_names(RUNTIME))
def test_runtime(check: str):
    failure = outcomes(RUNTIME)[check]
    assert not failure, failure

# SPDX-License-Identifier: Apache-2.0
"""The simulated AscendCL without torch."""

from __future__ import annotations

import pytest

from tests.simulated import check_names, outcomes, simulate

pytestmark = pytest.mark.needs_torch_npu

RUNTIME = "tests.runtime_checks"


@pytest.mark.parametrize("check", check_names(RUNTIME))
def test_runtime(check: str):
    failure = outcomes(RUNTIME)[check]
    assert not failure, failure


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 4), ("2", 1), ("3,0,1", 3), ("1,7,0", 1), ("0,0", 1), ("-1", 0), ("nothing", 0)],
)
def test_visible_devices(visible: str, count: int):
    """Up to the first number that is none of them."""
    code = """if True:
        import ctypes
        runtime = ctypes.CDLL("libascendcl.so")
        count = ctypes.c_uint32()
        assert runtime.aclrtGetDeviceCount(ctypes.byref(count)) == 0
        refused = [runtime.aclrtSetDevice(device) for device in range(count.value, 4)]
        numbers = [runtime.ascend_sim_number_of_device(device) for device in range(count.value)]
        print(count.value, set(refused) <= {107001}, numbers)
    """
    done = simulate("-c", code, options=("--devices", "4"), ASCEND_RT_VISIBLE_DEVICES=visible)
    numbers = [int(number) for number in visible.split(",")[:count]] if visible else [0, 1, 2, 3]
    assert done.stdout.split("\n")[0] == f"{count} True {numbers}", (done.stdout, done.stderr)

# SPDX-License-Identifier: Apache-2.0
"""The simulator's kernels against the CPU's, and the demo's model on both."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from tests import kernel_cases, kernel_cases_more
from tests.simulated import ROOT, check_names, outcomes, simulate

needs_torch_npu = pytest.mark.needs_torch_npu

CHECKS = "tests.kernel_checks"
CASES = [case.name for case in [*kernel_cases.cases(), *kernel_cases_more.cases()]]
# With TASK_QUEUE_ENABLE=2 torch_npu prepares every kernel on its own thread, not the caller's.
SETTINGS = [("lazy", "1"), ("random", "2")]


@functools.cache
def differences(scheduler: str, task_queue: str) -> dict[str, list[str]]:
    """Compares all cases in one process."""
    done = simulate(
        "-m",
        "tests.kernel_compare",
        options=("--scheduler", scheduler),
        TASK_QUEUE_ENABLE=task_queue,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}"
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {entry["name"]: entry["differences"] for entry in found}


def test_case_names_are_unique():
    assert sorted(set(CASES)) == sorted(CASES)


@needs_torch_npu
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[0])
@pytest.mark.parametrize("case", CASES)
def test_kernel_does_what_the_cpu_does(case: str, setting: tuple[str, str]):
    assert differences(*setting)[case] == []


@needs_torch_npu
@pytest.mark.parametrize("scheduler", ["lazy", "random"])
@pytest.mark.parametrize("check", check_names(CHECKS))
def test_kernels(check: str, scheduler: str):
    options = ("--scheduler", scheduler, *(("--seed", "5") if scheduler == "random" else ()))
    failure = outcomes(CHECKS, options)[check]
    assert not failure, failure


# In a process of its own: after such an error torch_npu's queue takes nothing any more.
LAUNCH_FAILS = """
import torch
from ascend_sim import faults
x = torch.ones(4, device="npu")
torch.npu.synchronize()
faults.fail("aclnnMul", code=507035)
try:
    x * x
    torch.npu.synchronize()
except RuntimeError as error:
    print("raised:", "operator name is aclnnMul" in str(error))
"""


@needs_torch_npu
def test_launch_that_fails_names_the_kernel():
    assert simulate("-c", LAUNCH_FAILS).stdout.splitlines()[-1] == "raised: True"


@needs_torch_npu
def test_demo_model_makes_the_same_tokens():
    done = simulate("-m", "tests.kernel_model")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["npu"] == report["cpu"]
    assert len(report["cpu"]) == 24
    assert report["difference"] < 1e-3
    assert report["half_difference"] < 0.1
    assert report["paged_npu"] == report["cpu"]


def test_documentation_lists_every_kernel():
    sources = (ROOT / "src" / "ascend_sim" / "csrc" / "kernels").glob("*.cpp")
    text = (ROOT / "docs" / "operators.md").read_text()
    listed = set(re.findall(r"`(\w+)`", text[text.index("## Kernels") :]))
    assert listed == {name for path in sources for name in kernels_of(path)}


def kernels_of(path: Path) -> set[str]:
    """The kernels that a file defines by its macros, without those that only add Inplace."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.endswith("\\"))
    named = set(re.findall(r"^[A-Z_]+\((\w+),", text, re.MULTILINE))
    compared = re.findall(r"^COMPARE\(\w+, (\w+), ", text, re.MULTILINE)
    return named | set(compared)

# SPDX-License-Identifier: Apache-2.0
"""Activation, the command line, and what belongs to several processes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.simulated import ROOT, environment, simulate

pytestmark = pytest.mark.needs_torch_npu

BANNER = "SIMULATED Ascend runtime"


def run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=environment(**extra),
    )


def test_programs_that_only_import_torch_and_their_children():
    program = """
import os, subprocess, sys, torch
import torch.multiprocessing as mp
import ascend_sim
if __name__ == "__main__":
    print(torch.ones(3).npu().cpu().tolist(), ascend_sim.is_active())
    code = "import torch; print(torch.arange(2).npu().cpu().tolist())"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
"""
    done = simulate("-c", program)
    assert done.returncode == 0, done.stderr
    assert "[1.0, 1.0, 1.0] True" in done.stdout
    assert "[0, 1]" in done.stdout
    assert done.stderr.count(BANNER) == 1


def test_npu_tensors_go_to_other_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import torch
import torch.multiprocessing as mp

def child(given, answers):
    tensor = given.get()
    before = tensor.cpu().tolist()
    tensor.add_(1)
    torch.npu.synchronize()
    del tensor
    answers.put(before)

if __name__ == "__main__":
    mp.set_start_method("spawn")
    given, answers = mp.Queue(), mp.Queue()
    process = mp.Process(target=child, args=(given, answers))
    process.start()
    tensor = torch.arange(4, device="npu:0")
    torch.npu.synchronize()
    given.put(tensor)
    print(answers.get(timeout=60), tensor.cpu().tolist())
    process.join()
    print(process.exitcode)
""")
    done = simulate(str(program))
    assert done.stdout.splitlines()[-2:] == ["[0, 1, 2, 3] [1, 2, 3, 4]", "0"], done.stderr


def test_activate_inside_a_program():
    program = """
import sys
import ascend_sim
assert "torch" not in sys.modules
ascend_sim.activate(devices=3, memory="64MiB", soc="Ascend910_9391", scheduler="random", seed=5)
assert "torch" not in sys.modules
ascend_sim.activate()
import torch
print(torch.npu.device_count(), torch.npu.get_device_name(), torch.npu.mem_get_info(2)[1])
print(torch.arange(3).npu().cpu().tolist())
"""
    done = run("-c", program)
    assert done.stdout.splitlines()[-2:] == [f"3 Ascend910_9391 {64 * 2**20}", "[0, 1, 2]"], (
        done.stderr
    )
    assert f"{BANNER}: 3 x Ascend910_9391 on host memory, scheduler random, seed 5" in done.stderr


def test_activate_after_torch_is_refused():
    program = """
import torch
import ascend_sim
try:
    ascend_sim.activate()
except RuntimeError as error:
    print(error, ascend_sim.is_active())
try:
    ascend_sim.faults.counts()
except RuntimeError as error:
    print(error)
"""
    done = run("-c", program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "comes too late" in done.stdout
    assert "False" in done.stdout
    assert "isn't active" in done.stdout


def test_the_host_can_not_touch_device_memory():
    program = """
import ctypes, torch
tensor = torch.ones(4).npu()
print("before", flush=True)
ctypes.string_at(tensor.data_ptr(), 1)
print("after")
"""
    done = simulate("-c", program)
    assert done.stdout.splitlines()[-1] == "before"
    assert done.returncode == -signal.SIGSEGV


def test_faults_from_the_environment():
    program = """
import torch
try:
    torch.ones(3).npu()
except torch.OutOfMemoryError:
    print("out of memory")
"""
    done = simulate("-c", program, ASCEND_SIM_FAULTS="aclrtMallocAlign32@1-2=207001;aclrtInit=5")
    assert "out of memory" in done.stdout, done.stderr


def test_an_operation_without_a_kernel_says_so():
    program = """
import torch
a = torch.ones(3, 3).npu()
try:
    print(torch.linalg.eigh(a))
except RuntimeError as error:
    print("error", error)
print(torch.ones(2).npu().cpu().tolist())
"""
    done = simulate("-c", program)
    assert done.stdout.splitlines()[-1] == "[1.0, 1.0]", done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--devices", "0"), "devices=0 is out of range"),
        (("--memory", "much"), "memory='much' is no size"),
        (("--memory", "1k"), "memory='1k' is out of range"),
        (("--soc", "Ascend310"), "soc='Ascend310' is none of"),
        (("--seed", "-1"), "seed=-1 is out of range"),
    ],
)
def test_wrong_settings(options: tuple[str, ...], text: str):
    done = simulate("-c", "", options=options)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr


def test_a_program_that_is_not_there():
    done = run("-m", "ascend_sim", "--", "/no/such/program")
    assert done.returncode == 127
    assert "can't run '/no/such/program'" in done.stderr
    assert run("-m", "ascend_sim").returncode == 2


PLUGIN_CASES = {"in this process": (), "in others": ("-n", "1")}


@pytest.mark.parametrize("workers", PLUGIN_CASES.values(), ids=PLUGIN_CASES)
def test_the_plugin_puts_npus_under_tests(tmp_path, workers):
    (tmp_path / "test_it.py").write_text(
        "import torch\nimport hixl\n"
        "def test_it():\n    assert torch.ones(2).npu().cpu().sum() == 2\n"
    )
    options = ("--ascend-sim=random", "--ascend-sim-seed=7", "-p", "no:cacheprovider", *workers)
    done = run("-m", "pytest", *options, str(tmp_path / "test_it.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scheduler random, seed 7" in done.stdout


def test_the_plugin_takes_no_file_for_a_scheduler(tmp_path):
    done = run("-m", "pytest", "--ascend-sim", str(tmp_path))
    assert done.returncode == 4
    assert "write --ascend-sim=lazy" in done.stderr

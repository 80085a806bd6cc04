# SPDX-License-Identifier: Apache-2.0
"""The part of device copies that needs no torch, under the sanitizers and on a made-up runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
CSRC = Path(__file__).parents[1] / "csrc"
PARTS = ("device_copy", "acl_runtime", "runs", "block_order")
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined")


def compile_cpp(*arguments: object) -> None:
    subprocess.run(["g++", *FLAGS, *map(str, arguments)], check=True, timeout=100)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("native") / "device_copy_test"
    sources = [HERE / "device_copy_test.cpp", *(CSRC / f"{part}.cpp" for part in PARTS)]
    compile_cpp(f"-I{CSRC}", *sources, "-ldl", "-o", built)
    return built


@pytest.mark.parametrize("define", ["-DWITH_BATCH", "-DNO_BATCH"])
def test_copies_equal_the_models(program: Path, tmp_path: Path, define: str) -> None:
    runtime = tmp_path / "libascendcl.so"
    named = f"-Wl,-soname,{runtime.name}"
    compile_cpp("-shared", "-fPIC", named, define, HERE / "fake_acl.cpp", "-o", runtime)
    done = subprocess.run([program, runtime], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def test_without_a_runtime(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (
        0,
        "libascendcl.so is not loaded in this process\n",
    ), done.stderr


def test_device_memory_without_torch_npu_is_a_typed_error() -> None:
    """In a process of its own, where surely nobody has imported torch_npu."""
    code = """
        import pytest, torch
        from llm_datadist_torch import LLMFeatureNotEnabledError
        from llm_datadist_torch.memory import device_copies
        addresses, runs = torch.tensor([4096]), torch.tensor([[0, 0, 8]])
        device, host = torch.device("privateuseone:0"), torch.device("cpu")
        with pytest.raises(LLMFeatureNotEnabledError, match=r"no Ascend runtime.*import torch_npu"):
            device_copies.copy_runs(addresses, addresses, runs, device, host)
        with pytest.raises(ValueError, match="neither side is in device memory"):
            device_copies.copy_runs(addresses, addresses, runs, host, host)
    """
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, timeout=100
    )

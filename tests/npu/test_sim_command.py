# SPDX-License-Identifier: Apache-2.0
"""The library with and without ascend-sim: the command ``sim`` and the former module name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_simulated_npu, pytest.mark.whole_programs]

ROOT = Path(__file__).resolve().parents[2]
SIM = ("-m", "llm_datadist_torch", "sim")
# Hides an installed ascend_sim, as if it had never been installed.
WITHOUT_IT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ascend_sim":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, on no simulated NPU."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ASCEND_SIM_") or name == "ASCEND_SIM_CACHE"
    }
    libraries = os.environ["ASCEND_SIM_LIBRARIES"]
    paths = environment["LD_LIBRARY_PATH"].split(":")
    environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path != libraries)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        env=environment | extra,
    )


def simulate(*command: str) -> subprocess.CompletedProcess[str]:
    return run(*SIM, "--", sys.executable, *command)


def test_run_under_sim(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import llm_datadist, torch\n"
        "print(llm_datadist.LLMRole.MIX, torch.ones(2).npu().cpu().tolist())\n"
    )
    done = simulate("-m", "llm_datadist_torch", "run", str(program))
    assert done.stdout.splitlines()[-1].endswith("[1.0, 1.0]"), done.stderr


def test_options_are_the_simulators():
    done = run(*SIM, "--soc", "Ascend310", "--", "true")
    assert done.returncode == 2
    assert "python -m llm_datadist_torch sim: soc='Ascend310' is none of" in done.stderr
    assert run(*SIM).returncode == 2


def test_doctor_says_what_is_there():
    alone = run("-m", "llm_datadist_torch", "doctor", TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert "`import torch` loads torch_npu by itself, and fails" in alone.stdout
    assert "llm_datadist_torch sim" in alone.stdout
    simulated = simulate("-m", "llm_datadist_torch", "doctor").stdout
    assert "SIMULATED" in simulated
    assert "hixl: available, through the class hixl::Hixl of /" in simulated
    assert "libcann_hixl.so (CANN 9.1 or later)" in simulated


def test_benchmarks_refuse_to_give_figures():
    done = simulate("-m", "llm_datadist_torch", "bench", "copy", "--tiny")
    assert done.returncode != 0
    assert "simulated" in done.stderr


def test_without_the_simulator_the_command_says_what_to_install():
    code = WITHOUT_IT + (
        "from llm_datadist_torch.cli import main\nsys.exit(main(['sim', '--', 'true']))"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install ascend-sim" in done.stderr


def test_the_former_name_is_the_same_and_says_so():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from llm_datadist_torch import ascend_sim as former
    import llm_datadist_torch.ascend_sim.faults as former_faults
import ascend_sim
print(former.activate is ascend_sim.activate, former_faults is ascend_sim.faults)
print(caught[0].category.__name__, caught[0].message)
"""
    done = run("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    same, warning = done.stdout.splitlines()
    assert same == "True True", done.stderr
    assert warning.startswith("DeprecationWarning llm_datadist_torch.ascend_sim is deprecated")


def test_the_former_name_without_the_simulator_says_what_to_install():
    code = WITHOUT_IT + "import llm_datadist_torch.ascend_sim"
    done = run("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert "pip install ascend-sim" in done.stderr


def test_the_projects_folder_is_not_the_package():
    """Python starts in the repository's root, which has a folder ascend_sim/, on its path."""
    code = "import ascend_sim; print(ascend_sim.__file__)"
    found = run("-c", code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.strip()
    assert found.endswith("src/ascend_sim/__init__.py")

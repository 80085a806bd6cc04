# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what it says, that it tells the truth, and its status."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import llm_datadist_torch as ld
from llm_datadist_torch import BlocksCacheKey, CacheDesc, DataType
from llm_datadist_torch.cli import doctor, probes
from llm_datadist_torch.cli.probes import ChildView, DeviceChoice, IpcView, NpuRuntime
from llm_datadist_torch.cli.report import Finding, Report, as_fixes, as_json, as_text
from tests.compat.programs import run_module

FINE = NpuRuntime(False, "", True)


def found(report: Report, name: str) -> Finding:
    every = [*report.transports, *report.paths, *report.system]
    (finding,) = [finding for finding in every if finding.name == name]
    return finding


def test_json():
    done = run_module("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["problems"] == 0
    assert {"llm_datadist_torch", "python", "torch", "msgspec", "cryptography"} <= set(
        report["versions"]
    )
    names = [way["name"] for way in report["paths"]]
    assert names == ["same-process", "shared-mapping", "process-memory", "device-ipc", "relay"]
    assert all(finding["detail"] for part in ("paths", "system") for finding in report[part])


def test_fix_prints_commands(monkeypatch, tmp_path):
    scope, shmem = tmp_path / "ptrace_scope", tmp_path / "shmem_enabled"
    scope.write_text("1\n")
    shmem.write_text("always within_size advise [never] deny force\n")
    monkeypatch.setattr(probes, "_YAMA", scope)
    monkeypatch.setattr(probes, "_SHMEM_ENABLED", shmem)
    monkeypatch.setattr(probes, "npu_runtime", lambda: NpuRuntime(True, "", True))
    monkeypatch.setattr(probes, "default_device", lambda: DeviceChoice("cpu", "it is a test"))
    why = 'the package nixl-cu12 is not installed: pip install "llm_datadist_torch[nixl]"'
    monkeypatch.setattr(probes, "transports", lambda: {"local": "", "nixl": why})
    lines = as_fixes(doctor.examine()).splitlines()
    assert [line for line in lines if not line.startswith("# ")] == [
        "export TORCH_DEVICE_BACKEND_AUTOLOAD=0",  # what is wrong comes first
        'pip install "llm_datadist_torch[nixl]"',
        "sudo sysctl kernel.yama.ptrace_scope=0",
        "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    ]


def test_fix_says_what_no_command_mends():
    wrong = Finding("Placement.DEVICE", "wrong", "init would fail: the driver is gone")
    text = as_fixes(Report({}, [], [], [Finding("yama", "ok", "fine"), wrong]))
    assert text == (
        "# Placement.DEVICE: init would fail: the driver is gone\n# no command mends this\n"
    )
    assert as_fixes(Report({}, [], [], [])) == "# nothing to fix\n"


def test_json_and_fix_exclude_each_other():
    done = run_module("doctor", "--json", "--fix")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


def test_an_instance_that_runs():
    """Caches whose handle the program has dropped are listed: nothing else tells of them."""
    description = CacheDesc(1, [2, 1 << 20], DataType.DT_INT8)
    with ld.open(device="cpu", listen="127.0.0.1:0") as node:
        node.cache_manager.allocate_blocks_cache(description, BlocksCacheKey(node.cluster_id, 7))
        kept = node.cache_manager.allocate_blocks_cache(description)
        host, port = node.datadist.listen_address
        done = run_module("doctor", f"{host}:{port}")
    assert f"cluster {node.cluster_id} on cpu" in done.stdout, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "dropped its handle" in line)
    assert "cache 1: " in line
    assert "2.0 MiB" in line
    assert "7" in line
    assert kept.cache_id == 2


def test_the_child_leaves_nothing_behind():
    def left() -> tuple[int, int, set[str]]:
        maps = Path("/proc/self/maps").read_text().count("memfd")
        children = {
            child
            for task in Path("/proc/self/task").iterdir()
            for child in (task / "children").read_text().split()
        }
        return len(list(Path("/proc/self/fd").iterdir())), maps, children

    probes.look_from_a_child()
    before = left()
    for _ in range(10):
        probes.look_from_a_child()
    assert left() == before


def test_what_the_child_can_not_do_is_said(monkeypatch):
    monkeypatch.setattr(probes, "look_from_a_child", lambda: ChildView("no memfd", "no reading"))
    report = doctor.examine()
    for name, reason in (("shared-mapping", "no memfd"), ("process-memory", "no reading")):
        finding = found(report, name)
        assert (finding.state, bool(finding.remedy)) == ("no", True)
        assert reason in finding.detail
        assert reason in as_text(report)


@pytest.mark.parametrize(
    ("view", "state", "text"),
    [
        (IpcView("no such function"), "no", "no such function"),
        (IpcView("", "for all", ()), "ok", "a key is for all"),
        (IpcView("", "for all", ((0, 1),)), "ok", "npu:0 and npu:1 can't reach each other"),
    ],
)
def test_device_memory_between_processes(monkeypatch, view: IpcView, state: str, text: str):
    monkeypatch.setattr(probes, "device_ipc", lambda: view)
    finding = found(doctor.examine(), "device-ipc")
    assert finding.state == state
    assert text in finding.detail


@pytest.mark.parametrize(
    ("text", "state", "word"),
    [(None, "ok", "not in this kernel"), ("0\n", "ok", "=0"), ("1\n", "note", "own children")],
)
def test_yama(monkeypatch, tmp_path, text: str | None, state: str, word: str):
    path = tmp_path / "ptrace_scope"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(probes, "_YAMA", path)
    finding = found(doctor.examine(), "yama")
    assert finding.state == state
    assert word in finding.detail


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (None, "note"),
        ("always within_size advise [never] deny force\n", "note"),
        ("always within_size [advise] never deny force\n", "ok"),
    ],
)
def test_huge_pages(monkeypatch, tmp_path, text: str | None, state: str):
    path = tmp_path / "shmem_enabled"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(probes, "_SHMEM_ENABLED", path)
    assert found(doctor.examine(), "huge pages").state == state


@pytest.mark.parametrize(
    ("runtime", "state", "problems"),
    [
        (FINE, "note", 0),
        (NpuRuntime(True, "/lib/libascendcl.so", True), "ok", 0),
        (NpuRuntime(True, "", True), "wrong", 1),
        (NpuRuntime(True, "", False), "note", 0),
    ],
)
def test_states_of_the_device_runtime(monkeypatch, runtime, state: str, problems: int):
    monkeypatch.setattr(probes, "npu_runtime", lambda: runtime)
    monkeypatch.setattr(probes, "default_device", lambda: DeviceChoice("cpu", "it is a test"))
    report = doctor.examine()
    assert found(report, "torch_npu").state == state
    assert len(report.problems) == json.loads(as_json(report))["problems"] == problems
    last = as_text(report).splitlines()[-1]
    assert last == ("1 problem(s)" if problems else "no problem found")


@pytest.mark.parametrize(
    ("program", "state", "word"),
    [
        ("raise ImportError('no libhccl')", "ok", "means cpu: .*no libhccl"),
        ("import os; os._exit(3)", "wrong", "init would fail: status 3"),
    ],
)
def test_what_a_device_cache_is_on(monkeypatch, tmp_path, program: str, state: str, word: str):
    (tmp_path / "torch_npu.py").write_text(program)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(probes, "npu_runtime", lambda: NpuRuntime(True, "", False))
    finding = found(doctor.examine(), "Placement.DEVICE")
    assert finding.state == state
    assert re.search(word, finding.detail)


@pytest.mark.thorough
@pytest.mark.parametrize("autoload", ["0", "1"])
def test_a_torch_npu_that_can_not_be_imported(monkeypatch, tmp_path, autoload: str):
    """It raises when it is imported; torch loads it by its entry point, which is not there."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libascendcl.so')\n")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/no/such/place")
    done = run_module("doctor", path=str(tmp_path))
    assert done.returncode == int(autoload), done.stdout
    assert "Ascend runtime (libascendcl.so) is not found" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout


@pytest.mark.parametrize(
    ("torch_npu", "state"), [("2.13.0", "ok"), ("2.13.0.post1", "ok"), ("2.12.0", "wrong")]
)
def test_versions_that_fit(monkeypatch, torch_npu: str, state: str):
    versions = {"torch": "2.13.0+cpu", "torch_npu": torch_npu}
    monkeypatch.setattr(doctor, "installed_versions", lambda: versions)
    finding = found(doctor.examine(), "versions")
    assert finding.state == state
    assert finding.commands == (() if state == "ok" else ("pip install torch==2.12.0",))


@pytest.mark.parametrize("variable", ["LD_LIBRARY_PATH", "ASCEND_HOME_PATH"])
def test_where_the_runtime_is_looked_for(monkeypatch, tmp_path, variable: str):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    library = tmp_path / "lib64" / "libascendcl.so"
    library.parent.mkdir()
    library.touch()
    home = tmp_path if variable == "ASCEND_HOME_PATH" else library.parent
    monkeypatch.setenv(variable, str(home))
    assert probes.npu_runtime().library == str(library)

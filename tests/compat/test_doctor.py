# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what it says, that it tells the truth, and its status."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path

import pytest

import llm_datadist_torch as ld
from llm_datadist_torch import BlocksCacheKey, CacheDesc, DataType
from llm_datadist_torch.cli import ascend, doctor, probes
from llm_datadist_torch.cli.probes import (
    ChildView,
    DeviceChoice,
    IpcView,
    Npu,
    NpuRuntime,
    NpuView,
)
from llm_datadist_torch.cli.report import Finding, Report, as_fixes, as_json, as_text
from llm_datadist_torch.values import cann
from llm_datadist_torch.values.versions import installed_versions
from tests.compat.programs import run_module

FINE = NpuRuntime(False, "", True)


@pytest.fixture(autouse=True)
def no_installation_of_this_machine(monkeypatch, tmp_path):
    """Nothing of a CANN that this machine may have, and no settings of torch_npu's."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", *ascend._SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cann, "_ASCEND", tmp_path / "Ascend")
    monkeypatch.setattr(cann, "_INSTALL_INFO", tmp_path / "ascend_install.info")


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


@pytest.mark.parametrize(
    ("reason", "detail", "remedy"),
    [
        ("not found (x.so: none): install CANN", "not found (x.so: none)", "install CANN"),
        ("its settings leave it out", "its settings leave it out", ""),
    ],
)
def test_a_transport_that_is_not_there(monkeypatch, reason: str, detail: str, remedy: str):
    monkeypatch.setattr(probes, "transports", lambda: {"local": "", "hixl": reason})
    finding = found(doctor.examine(), "hixl")
    assert (finding.state, finding.detail, finding.remedy) == ("no", detail, remedy)


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
    monkeypatch.setattr(ascend, "installed_versions", lambda: versions)
    finding = found(doctor.examine(), "versions")
    assert finding.state == state
    assert finding.commands == (() if state == "ok" else ("pip install torch==2.12.0",))


def of_npus(name: str) -> Finding:
    return found(Report({}, [], [], ascend.findings()), name)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TOOLKIT = "package_name=Ascend-cann-toolkit\nversion={}\narch=aarch64\nos=linux\n"
RUNNING = "# version: 1.0\nruntime_running_version=[7.6.0.1.220:{0}]\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (f"cann/{platform.machine()}-linux/ascend_toolkit_install.info", TOOLKIT),
        ("cann/ascend_toolkit_install.info", TOOLKIT),
        (f"ascend-toolkit/latest/{platform.machine()}-linux/ascend_nnrt_install.info", TOOLKIT),
        ("ascend-toolkit/latest/version.cfg", RUNNING),
        ("cann/version.cfg", "toolkit_running_version=[{}]\n"),
    ],
)
@pytest.mark.parametrize("version", ["8.3.RC1", "9.2.0-beta.2"])
def test_the_version_of_cann(tmp_path, file: str, text: str, version: str):
    write(tmp_path / "Ascend" / file, text.format(version))
    assert installed_versions()["CANN"] == version
    finding = of_npus("CANN")
    assert finding.state == "ok"
    assert finding.detail.startswith(f"{version}, says {tmp_path / 'Ascend' / file}")


def test_the_cann_that_is_used_comes_first(monkeypatch, tmp_path):
    """That is what set_env.sh has named; of its packages the toolkit."""
    write(tmp_path / "Ascend/cann/ascend_toolkit_install.info", TOOLKIT.format("9.2.0"))
    write(tmp_path / "mine/ascend_toolkit_install.info", TOOLKIT.format("9.1.0"))
    write(tmp_path / "mine/ascend_ops_install.info", TOOLKIT.format("9.0.0"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "mine"))
    assert installed_versions()["CANN"] == "9.1.0"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe version", b"version=\n", b"[]", None])
def test_files_without_a_version_of_cann(tmp_path, content: bytes | None):
    for name in ("ascend_toolkit_install.info", "version.cfg"):
        path = tmp_path / "Ascend" / "cann" / name
        write(path, "")
        if content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(content)
    assert installed_versions()["CANN"] == "not found"
    assert "no file tells of a version" in of_npus("CANN").detail


@pytest.mark.parametrize(
    ("version", "state", "word"),
    [
        ("9.1.0", "ok", "torch_npu 2.13.0 was released for CANN 9.2.0"),
        ("8.5.0.alpha003", "ok", "released for"),
        ("8.3.RC1", "note", "have no HIXL"),
        ("unknown", "note", "have no HIXL"),
        (None, "note", "no file tells of a version"),
    ],
)
def test_whether_cann_fits_torch_npu(monkeypatch, tmp_path, version, state: str, word: str):
    if version is not None:
        info = tmp_path / "Ascend/cann/ascend_toolkit_install.info"
        write(info, TOOLKIT.format(version))
    versions = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0"}
    monkeypatch.setattr(ascend, "installed_versions", lambda: versions)
    monkeypatch.setattr(ascend, "npu_is_simulated", lambda: False)
    finding = of_npus("CANN")
    assert finding.state == state
    assert word in finding.detail
    assert finding.remedy == ("install CANN 9.2.0" if "no HIXL" in word else "")


def test_the_version_of_the_driver(tmp_path):
    assert installed_versions()["NPU driver"] == "not found"
    write(tmp_path / "Ascend/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\n")
    assert installed_versions()["NPU driver"] == "25.5.0"
    write(tmp_path / "ascend_install.info", f"Driver_Install_Path_Param={tmp_path / 'elsewhere'}\n")
    write(tmp_path / "elsewhere/driver/version.info", "Version=26.0.rc1\n")
    assert installed_versions()["NPU driver"] == "26.0.rc1"


CHIPS = (Npu("Ascend910B4", 32 << 30), Npu("Ascend910B4", 32 << 30))


@pytest.mark.parametrize(
    ("view", "states", "words"),
    [
        (NpuView(CHIPS, expandable=False), "ok ok", r"npu:1 Ascend910B4 \(Atlas A2.* as a whole"),
        (NpuView(CHIPS, expandable=True), "ok note", "may refuse to register.* IPC key"),
        (NpuView(CHIPS, None, "NPU out of memory"), "ok note", "no memory: NPU out of memory"),
        (NpuView((Npu("Ascend310P3", 1),), expandable=False), "no ok", "not supported are"),
        (NpuView((), expandable=False), "no ok", "sees none"),
        (NpuView(problem="RuntimeError: no"), "wrong", "looked at: RuntimeError: no"),
    ],
)
def test_npus_and_their_allocator(monkeypatch, view: NpuView, states: str, words: str):
    setting = "expandable_segments:SETTING"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", setting)
    monkeypatch.setattr(probes, "default_device", lambda: DeviceChoice("npu:0", "it is a test"))
    monkeypatch.setattr(probes, "npus", lambda: view)
    report = Report({}, [], [], ascend.findings())
    findings = [each for each in report.system if each.name in ("NPUs", "allocator")]
    assert " ".join(finding.state for finding in findings) == states
    details = " ".join(finding.detail for finding in findings)
    assert re.search(words, details)
    assert (setting in details) == (len(findings) == 2)
    assert as_fixes(report).count("expandable_segments:False") == (view.expandable is True)


def test_settings_are_named_where_torch_npu_fails(monkeypatch):
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:true")
    choice = DeviceChoice("", "", "ValueError: Expected 'True' or 'False'")
    monkeypatch.setattr(probes, "default_device", lambda: choice)
    finding = of_npus("Placement.DEVICE")
    assert finding.state == "wrong"
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:true" in finding.detail


@pytest.mark.parametrize(("free", "state"), [(1 << 30, "ok"), (63 << 20, "note"), (None, "note")])
def test_shared_memory(monkeypatch, free: int | None, state: str):
    space = None if free is None else (1 << 30, free)
    monkeypatch.setattr(probes, "shared_memory_space", lambda: space)
    finding = found(doctor.examine(), "/dev/shm")
    assert (finding.state, bool(finding.remedy)) == (state, state == "note")


def test_a_look_that_fails_is_a_finding(monkeypatch):
    """Whatever a broken machine raises, the rest is still reported."""

    def broken() -> int:
        raise KeyError("what no probe expects")

    monkeypatch.setattr(probes, "yama_scope", broken)
    monkeypatch.setattr(probes, "look_from_a_child", broken)
    report = doctor.examine()
    assert found(report, "yama").state == found(report, "paths").state == "wrong"
    assert "KeyError: 'what no probe expects'" in found(report, "yama").detail
    assert found(report, "loopback pull").state == "ok"
    assert report.exit_status == 1


@pytest.mark.parametrize("variable", ["LD_LIBRARY_PATH", "ASCEND_HOME_PATH"])
def test_where_the_runtime_is_looked_for(monkeypatch, tmp_path, variable: str):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    library = tmp_path / "lib64" / "libascendcl.so"
    library.parent.mkdir()
    library.touch()
    home = tmp_path if variable == "ASCEND_HOME_PATH" else library.parent
    monkeypatch.setenv(variable, str(home))
    assert probes.npu_runtime().library == str(library)

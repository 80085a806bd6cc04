# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what works on this machine, and a reason for everything that doesn't."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

from llm_datadist_torch import __version__
from llm_datadist_torch.cli import probes
from llm_datadist_torch.transports.nixl.engine import why_exit_crashes
from llm_datadist_torch.values.environment import npu_is_simulated

State = Literal["ok", "no", "note", "wrong"]

_PACKAGES = ("torch", "msgspec", "cryptography", "numpy", "torch_npu")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: "ok": it works; "no": it doesn't, and something else serves; "note": for your
            information; "wrong": programs will fail because of it.
        detail: What was found, or why it doesn't work.
        remedy: What to do about it, if anything.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        versions: What is installed.
        transports: What moves bytes between instances.
        paths: How the local transport reaches a peer's memory, fastest first.
        system: What the kernel and the device runtime allow.
    """

    versions: dict[str, str]
    transports: list[Finding]
    paths: list[Finding]
    system: list[Finding]

    @property
    def problems(self) -> list[Finding]:
        """What will make programs fail."""
        every = [*self.transports, *self.paths, *self.system]
        return [finding for finding in every if finding.state == "wrong"]


def examine() -> Report:
    """Look at everything. Takes less than a second; changes nothing."""
    paths = _paths()
    return Report(_versions(), _transports(), paths, _system())


def as_json(report: Report) -> str:
    """The report as JSON, one line at the end."""
    return json.dumps(asdict(report) | {"problems": len(report.problems)}, indent=2) + "\n"


def as_text(report: Report) -> str:
    """The report for people."""
    width = max(len(name) for name in report.versions)
    lines = [f"{name:<{width}}  {version}" for name, version in report.versions.items()]
    for title, findings in (
        ("transports", report.transports),
        ("paths of the local transport, fastest first", report.paths),
        ("system", report.system),
    ):
        lines += ["", title]
        for finding in findings:
            lines.append(f"  {finding.state:<5}  {finding.name}: {finding.detail}")
            if finding.remedy:
                lines.append(f"         -> {finding.remedy}")
    problems = len(report.problems)
    lines += ["", f"{problems} problem(s)" if problems else "no problem found"]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    found = {
        "llm_datadist_torch": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "kernel": platform.release(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _transports() -> list[Finding]:
    found = {name: _transport(name, reason) for name, reason in probes.transports().items()}
    found["local"] = Finding("local", "ok", "embedded; between hosts its last way only")
    return list(found.values())


def _transport(name: str, reason: str) -> Finding:
    if not reason and name == "nixl" and (crash := why_exit_crashes()):
        detail, _, remedy = crash.rpartition(". ")
        return Finding(name, "note", f"available; {detail}", remedy)
    if not reason:
        used = probes.hixl() if name == "hixl" else ""
        return Finding(name, "ok", f"available, through {used}" if used else "available")
    detail, _, remedy = reason.partition(": ")
    return Finding(name, "no", detail, remedy)


def _paths() -> list[Finding]:
    child = probes.look_from_a_child()
    paths = [Finding("same-process", "ok", "plain copies between instances of one process")]
    paths.append(_path("shared-mapping", "memfd regions that peers map", child.mapping))
    paths.append(_path("process-memory", "process_vm_readv of a process's memory", child.reading))
    paths.append(Finding("relay", "ok", "through the control connection: slow, works everywhere"))
    return paths


def _path(name: str, what: str, why_not: str) -> Finding:
    if not why_not:
        return Finding(name, "ok", f"{what}; tried from another process")
    return Finding(name, "no", f"{what}: not available, {why_not}", "a slower way serves instead")


def _system() -> list[Finding]:
    looks: list[Callable[[], Finding]] = [_yama, _huge_pages, _npu, _device]
    return [look() for look in looks]


def _yama() -> Finding:
    scope = probes.yama_scope()
    if scope is None:
        return Finding("yama", "ok", "not in this kernel, so it forbids nothing")
    if scope == 0:
        return Finding("yama", "ok", "ptrace_scope=0: processes of one user may read each other")
    return Finding(
        "yama",
        "note",
        f"ptrace_scope={scope}: unless privileged, a process may read only its own children, so"
        " process-memory will not work between peers",
        "sysctl kernel.yama.ptrace_scope=0, or let the library allocate caches (shared-mapping)",
    )


def _huge_pages() -> Finding:
    mode = probes.shared_huge_pages()
    if mode in ("advise", "within_size", "always", "force"):
        return Finding("huge pages", "ok", f"shared memory gets them (shmem_enabled: {mode})")
    return Finding(
        "huge pages",
        "note",
        f"allocated caches get none (shmem_enabled: {mode or 'not in this kernel'}), copies are"
        " somewhat slower",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled" if mode else "",
    )


def _npu() -> Finding:
    state = probes.npu_runtime()
    if not state.installed:
        return Finding("torch_npu", "note", "not installed; caches are in CPU memory")
    if npu_is_simulated():
        detail = "installed, over the SIMULATED Ascend runtime: nothing here is an NPU"
        return Finding("torch_npu", "ok", detail)
    if state.library:
        return Finding("torch_npu", "ok", f"installed, Ascend runtime at {state.library}")
    problem = "installed, but the Ascend runtime (libascendcl.so) is not found: "
    remedy = (
        "source set_env.sh of the CANN toolkit; or, without an NPU, simulate one: python -m"
        " llm_datadist_torch sim -- python program.py; or uninstall torch_npu"
    )
    if state.autoload:
        return Finding(
            "torch_npu",
            "wrong",
            problem + "`import torch` loads torch_npu by itself, and fails",
            f"{remedy}, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
    return Finding(
        "torch_npu",
        "note",
        problem + "it can't be imported; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch working",
        remedy,
    )


def _device() -> Finding:
    choice = probes.default_device()
    if choice.problem:
        return Finding("Placement.DEVICE", "wrong", f"init would fail: {choice.problem}")
    return Finding("Placement.DEVICE", "ok", f"means {choice.device}: {choice.reason}")

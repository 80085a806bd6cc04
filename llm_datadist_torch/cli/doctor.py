# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what works on this machine, and a reason for everything that doesn't."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from llm_datadist_torch.api.examination import limits
from llm_datadist_torch.cli import loopback, peer, probes
from llm_datadist_torch.cli.report import Finding, Report
from llm_datadist_torch.transports.nixl.engine import why_exit_crashes
from llm_datadist_torch.values.environment import npu_is_simulated
from llm_datadist_torch.values.versions import NOT_INSTALLED, installed_versions

_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_PIP = re.compile(r"""pip install (?:'[^']+'|"[^"]+"|[\w-]+)""")


def examine(address: str | None = None) -> Report:
    """Look at everything. Takes some seconds; changes nothing.

    Args:
        address: Host and port of an instance that is to be examined, too; None for none.
    """
    paths = _paths()
    available = probes.transports()
    instance, examined = ([], True) if address is None else peer.examine(address, available)
    transports = _transports(available)
    return Report(installed_versions(), transports, paths, _system(), instance, examined)


def _transports(available: Mapping[str, str]) -> list[Finding]:
    found = {name: _transport(name, reason) for name, reason in available.items()}
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
    return Finding(name, "no", detail, remedy, tuple(_PIP.findall(remedy)))


def _paths() -> list[Finding]:
    child = probes.look_from_a_child()
    paths = [Finding("same-process", "ok", "plain copies between instances of one process")]
    paths.append(_path("shared-mapping", "memfd regions that peers map", child.mapping))
    paths.append(_path("process-memory", "process_vm_readv of a process's memory", child.reading))
    paths.append(_device_ipc())
    paths.append(Finding("relay", "ok", "through the control connection: slow, works everywhere"))
    return paths


def _path(name: str, what: str, why_not: str) -> Finding:
    if not why_not:
        return Finding(name, "ok", f"{what}; tried from another process")
    return Finding(name, "no", f"{what}: not available, {why_not}", "a slower way serves instead")


def _device_ipc() -> Finding:
    what = "device memory of other processes, opened by AscendCL's keys"
    view = probes.device_ipc()
    if view.problem:
        remedy = "HIXL or the relay serves instead" if probes.npu_runtime().installed else ""
        return Finding("device-ipc", "no", f"{what}: not available, {view.problem}", remedy)
    apart = ", ".join(f"npu:{one} and npu:{other}" for one, other in view.apart)
    reach = f"; {apart} can't reach each other" if apart else ""
    return Finding("device-ipc", "ok", f"{what}; a key is {view.guard}{reach}")


def _system() -> list[Finding]:
    looks: list[Callable[[], Finding]] = [_yama, _huge_pages, _npu, _fit, _device, loopback.pull]
    found = [look() for look in looks]
    return [*found[:2], *peer.limits(limits()), *found[2:]]


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
        "sysctl kernel.yama.ptrace_scope=0, or LLMConfig.allow_ptrace = True on both sides, or let"
        " the library allocate caches (shared-mapping)",
        ("sudo sysctl kernel.yama.ptrace_scope=0",),
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
        f"echo advise > {_SHMEM_ENABLED}" if mode else "",
        (f"echo advise | sudo tee {_SHMEM_ENABLED}",) if mode else (),
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
            ("export TORCH_DEVICE_BACKEND_AUTOLOAD=0",),
        )
    return Finding(
        "torch_npu",
        "note",
        problem + "it can't be imported; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch working",
        remedy,
    )


def _fit() -> Finding:
    """Whether torch and torch_npu belong together: torch_npu is built for one torch."""
    found = installed_versions()
    torch, torch_npu = found["torch"], found["torch_npu"]
    if torch_npu == NOT_INSTALLED:
        return Finding("versions", "ok", "torch alone; nothing has to fit it")
    if _release(torch) == _release(torch_npu):
        return Finding("versions", "ok", f"torch {torch} and torch_npu {torch_npu} belong together")
    return Finding(
        "versions",
        "wrong",
        f"torch_npu {torch_npu} is made for another torch than {torch}",
        f"pip install torch=={_release(torch_npu)}",
        (f"pip install torch=={_release(torch_npu)}",),
    )


def _release(version: str) -> str:
    """The first three numbers of a version, such as 2.13.0."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found[0] if found else version


def _device() -> Finding:
    choice = probes.default_device()
    if choice.problem:
        return Finding("Placement.DEVICE", "wrong", f"init would fail: {choice.problem}")
    return Finding("Placement.DEVICE", "ok", f"means {choice.device}: {choice.reason}")

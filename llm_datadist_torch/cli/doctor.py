# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what works on this machine, and a reason for everything that doesn't."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from llm_datadist_torch.api.examination import limits
from llm_datadist_torch.cli import ascend, loopback, peer, probes
from llm_datadist_torch.cli.report import Finding, Report
from llm_datadist_torch.observe.html import size
from llm_datadist_torch.transports.nixl.engine import why_exit_crashes
from llm_datadist_torch.values.versions import installed_versions

_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_LITTLE_SHARED_MEMORY = 64 << 20
"""What a container has without ``--shm-size``: less is surely too little."""

_PIP = re.compile(r"""pip install (?:'[^']+'|"[^"]+"|[\w-]+)""")


def examine(address: str | None = None) -> Report:
    """Look at everything. Takes some seconds; changes nothing.

    Args:
        address: Host and port of an instance that is to be examined, too; None for none.
    """
    paths = _looked_at("paths", _paths)
    available, transports = _available()
    instance, examined = ([], True) if address is None else peer.examine(address, available)
    return Report(installed_versions(), transports, paths, _system(), instance, examined)


def _available() -> tuple[dict[str, str], list[Finding]]:
    available: dict[str, str] = {}

    def look() -> list[Finding]:
        available.update(probes.transports())
        return _transports(available)

    transports = _looked_at("transports", look)
    return available, transports


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
    # What is before may have colons of its own, such as those of an error.
    detail, colon, remedy = reason.rpartition(": ")
    if not colon:
        detail, remedy = reason, ""
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
    return [
        *_looked_at("yama", _yama),
        *_looked_at("huge pages", _huge_pages),
        *_looked_at(probes.SHARED_MEMORY, _shared_memory),
        *_looked_at("limits", lambda: peer.limits(limits())),
        *_looked_at("NPU", ascend.findings),
        *_looked_at("loopback pull", loopback.pull),
    ]


def _looked_at(name: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What a look found; one that fails is a finding itself, and the others are still there."""
    try:
        found = look()
    except Exception as error:  # noqa: BLE001 (a broken machine may raise anything)
        detail = f"looking at it failed: {type(error).__name__}: {error}"
        return [Finding(name, "wrong", detail, "report it, with the output of doctor --json")]
    return found if isinstance(found, list) else [found]


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


def _shared_memory() -> Finding:
    """Caches are memfds, which it does not limit; but other parts of a service depend on it."""
    name, uses = (
        probes.SHARED_MEMORY,
        "not used by this library; vLLM, UCX and torch's workers use it",
    )
    space = probes.shared_memory_space()
    if space is None:
        return Finding(name, "note", f"not there; {uses}", "mount a tmpfs there")
    total, free = space
    detail = f"{size(free)} of {size(total)} free; {uses}"
    if free >= _LITTLE_SHARED_MEMORY:
        return Finding(name, "ok", detail)
    remedy = "remove what is left in it, or --shm-size 16g for a container"
    return Finding(name, "note", detail, remedy)

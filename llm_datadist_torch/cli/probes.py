# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` tries out. No probe imports a device runtime or leaves anything behind."""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory.device import choose_device
from llm_datadist_torch.transports.local.host import why_forbidden
from llm_datadist_torch.transports.registry import why_unavailable
from llm_datadist_torch.values.cann import cann_homes
from llm_datadist_torch.values.environment import environment_text

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (looked at, not written)
"""Where POSIX shared memory is."""
_PROBE_BYTES = 4096
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")
_CHOICE_S = 60


@dataclass(frozen=True)
class ChildView:
    """Why another process can't reach this one's memory; "" where it can.

    Attributes:
        mapping: By mapping a shareable region.
        reading: By process_vm_readv.
    """

    mapping: str
    reading: str


def look_from_a_child() -> ChildView:
    """Let a forked child reach for our memory, as a peer would.

    The other way round would prove less: a parent may read its child where peers may not.
    """
    region = _C.HostRegion.create(_PROBE_BYTES, shareable=True)
    (theirs,) = region.tensors([0], [_PROBE_BYTES], torch.uint8)
    mine = torch.zeros(_PROBE_BYTES, dtype=torch.uint8)
    source, target = torch.tensor([theirs.data_ptr()]), torch.tensor([mine.data_ptr()])
    runs = torch.tensor([[0, 0, _PROBE_BYTES]])
    us = os.getpid()

    def look() -> ChildView:
        mapping = region.reason
        if region.fd >= 0:
            try:
                _C.PeerMapping.open(
                    us, region.fd, region.inode, region.device, region.nbytes, region.offset
                )
            except OSError as error:
                mapping = f"{error}; {why_forbidden(error.errno or 0, us)}"
        _, number = _C.read_process(us, target, source, runs)
        return ChildView(mapping, why_forbidden(number, us) if number else "")

    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of fork with threads; this child takes no lock and imports nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            view = look()
            os.write(write_end, json.dumps([view.mapping, view.reading]).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        return ChildView("the probing process died", "the probing process died")
    return ChildView(*json.loads(answer))


def yama_scope() -> int | None:
    """``ptrace_scope`` of the Yama security module; None where there is none."""
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):
        return None


def shared_huge_pages() -> str:
    """The kernel's mode of huge pages for shared memory; "" where it has none."""
    try:
        found = re.search(r"\[(\w+)\]", _SHMEM_ENABLED.read_text())
    except OSError:
        return ""
    return found.group(1) if found else ""


def shared_memory_space() -> tuple[int, int] | None:
    """All bytes and free bytes of /dev/shm; None where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


@dataclass(frozen=True)
class NpuRuntime:
    """Whether torch_npu could be imported.

    Attributes:
        installed: Whether there is a package torch_npu.
        library: Where the Ascend runtime's library is; "" if it isn't found.
        autoload: Whether ``import torch`` loads torch_npu by itself.
    """

    installed: bool
    library: str
    autoload: bool


def npu_runtime() -> NpuRuntime:
    """Look for torch_npu and the library that it needs; neither is loaded."""
    return NpuRuntime(
        importlib.util.find_spec("torch_npu") is not None,
        _find_library("ascendcl"),
        environment_text("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0",
    )


@dataclass(frozen=True)
class DeviceChoice:
    """What ``Placement.DEVICE`` means where ``LLMConfig`` says nothing.

    Attributes:
        device: Such as "cpu" or "npu:0".
        reason: Why.
        problem: Why there is none, else "".
    """

    device: str
    reason: str
    problem: str = ""


def default_device() -> DeviceChoice:
    """Choose a device as ``init`` would; a process of its own does what needs torch_npu."""
    if not npu_runtime().installed:
        choice = choose_device("auto", 0)
        return DeviceChoice(str(choice.device), choice.reason)
    try:
        device, reason = _in_a_child(
            "choice = choose_device('auto', 0)",
            "print(json.dumps([str(choice.device), choice.reason]))",
        )
    except _ChildError as error:
        return DeviceChoice("", "", str(error))
    return DeviceChoice(device, reason)


@dataclass(frozen=True)
class Npu:
    """One NPU.

    Attributes:
        chip: Such as "Ascend910B4".
        total_bytes: Its memory.
    """

    chip: str
    total_bytes: int


@dataclass(frozen=True)
class NpuView:
    """The NPUs, as torch_npu sees them.

    Attributes:
        devices: All of them.
        expandable: Whether torch_npu maps memory piece by piece; None where it gave none.
        allocator_problem: Why it gave none, else "".
        problem: Why torch_npu has no NPU, else "".
    """

    devices: tuple[Npu, ...] = ()
    expandable: bool | None = None
    allocator_problem: str = ""
    problem: str = ""


def npus() -> NpuView:
    """Look at all NPUs, and allocate one tensor on the first; a process of its own does that.

    Only torch_npu knows which of several variables it obeys, and which it refuses.
    """
    try:
        names, expandable, problem = _in_a_child(
            "from llm_datadist_torch.memory.npu_probe import look",
            "print(json.dumps(look()))",
        )
    except _ChildError as error:
        return NpuView(problem=str(error))
    return NpuView(tuple(Npu(*each) for each in names), expandable, problem)


def transports() -> dict[str, str]:
    """All transports that are installed -> why an instance here would not have it, "" if it would.

    As for an instance that listens on loopback.
    """
    if not npu_runtime().installed:
        return why_unavailable(choose_device("auto", 0).device)
    try:
        return dict(
            _in_a_child(
                "from llm_datadist_torch.transports.registry import why_unavailable",
                "print(json.dumps(list(why_unavailable(choose_device('auto', 0).device).items())))",
            )
        )
    except _ChildError:
        # Which the finding on Placement.DEVICE tells more of.
        return why_unavailable(torch.device("cpu"))


def hixl() -> str:
    """Through what HIXL is called here, and what was not taken instead; "" if it can't be."""
    try:
        (used,) = _in_a_child(
            "from llm_datadist_torch.transports.hixl.ports import describe",
            "print(json.dumps([describe()]))",
        )
    except _ChildError:
        return ""
    return str(used)


@dataclass(frozen=True)
class IpcView:
    """Whether device memory can be shared between processes.

    Attributes:
        problem: Why not; "" if it can.
        guard: Who may import by a key.
        apart: Pairs of NPUs that can't reach each other's memory.
    """

    problem: str
    guard: str = ""
    apart: tuple[tuple[int, int], ...] = ()


def device_ipc() -> IpcView:
    """Look for AscendCL's functions, in a process of its own where that needs torch_npu."""
    if not npu_runtime().installed:
        return IpcView("Placement.DEVICE means host memory here")
    try:
        problem, guard, apart = _in_a_child(
            "from llm_datadist_torch.transports.local.ipc import probe",
            "print(json.dumps(probe.look(choose_device('auto', 0).device)))",
        )
    except _ChildError as error:
        return IpcView(str(error))
    return IpcView(problem, guard, tuple((one, other) for one, other in apart))


class _ChildError(Exception):
    """Why a program in a process of its own came to nothing."""


def _in_a_child(*lines: str) -> list[Any]:
    """The JSON list that a program prints last, run as if it had come past ``import torch``.

    ``_npu`` of the doctor is about those that don't.

    Raises:
        _ChildError: It failed.
    """
    program = (
        "import json, os",
        "os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'",
        "from llm_datadist_torch.memory.device import choose_device",
        *lines,
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(program)],
            capture_output=True,
            text=True,
            timeout=_CHOICE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _ChildError(f"choosing a device took more than {_CHOICE_S} s") from None
    if done.returncode != 0:
        raise _ChildError(_last_error(done.stderr) or f"status {done.returncode}")
    printed: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def _last_error(text: str) -> str:
    """The line with the exception that ended a program, else the last line.

    torch_npu puts a line with a code of its own behind its messages.
    """
    lines = text.strip().splitlines()
    errors = [line for line in lines if _EXCEPTION.match(line)]
    return (errors or lines or [""])[-1]


def _find_library(name: str) -> str:
    folders = [Path(text) for text in environment_text("LD_LIBRARY_PATH").split(":") if text]
    folders += [home / "lib64" for home in cann_homes()]
    for folder in folders:
        library = folder / f"lib{name}.so"
        if library.exists():
            return str(library)
    return ctypes.util.find_library(name) or ""

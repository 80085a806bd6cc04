# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` says of NPUs: torch_npu, CANN, whether they fit, the devices, the allocator."""

from __future__ import annotations

import re

from llm_datadist_torch.cli import probes
from llm_datadist_torch.cli.report import Finding, State
from llm_datadist_torch.memory.device import NPU
from llm_datadist_torch.memory.products import Support, product_of
from llm_datadist_torch.observe.html import size
from llm_datadist_torch.values.cann import Cann, cann_homes, installed_cann
from llm_datadist_torch.values.environment import environment_text, npu_is_simulated
from llm_datadist_torch.values.versions import NOT_INSTALLED, installed_versions

_OLDEST_CANN = (8, 5)
"""The oldest that torch_npu's release notes call compatible with torch_npu 2.9 and later, and the
oldest that has HIXL."""

_RELEASED_FOR = {
    "2.10.0.post4": "9.1.0",
    "2.10.0.post7": "9.2.0",
    "2.11.0": "9.1.0",
    "2.11.0.post3": "9.2.0",
    "2.12.0": "9.1.0",
    "2.12.0.post3": "9.2.0",
    "2.13.0": "9.2.0",
    "2.14.0": "9.2.0",
}
"""Versions of torch_npu -> the CANN that torch_npu's version tables put beside them."""

_SETTINGS = "PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


def findings() -> list[Finding]:
    """All of them. A process of its own does what needs torch_npu."""
    choice = probes.default_device()
    devices = _devices() if choice.device.startswith(NPU) else []
    return [_npu(), _fit(), _cann(), *devices, _device(choice)]


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


def _cann() -> Finding:
    """Whether the CANN that is installed fits torch_npu."""
    cann, torch_npu = installed_cann(), installed_versions()["torch_npu"]
    if npu_is_simulated():
        return Finding("CANN", "ok", "not used: its runtime is simulated")
    if cann is None:
        where = ", ".join(map(str, cann_homes()))
        state: State = "ok" if torch_npu == NOT_INSTALLED else "note"
        return Finding("CANN", state, f"no file tells of a version; looked in {where}")
    said = f"{cann.version}, says {cann.source}"
    if torch_npu == NOT_INSTALLED:
        return Finding("CANN", "ok", f"{said}; without torch_npu nothing uses it")
    return _fit_of(cann, torch_npu, said)


def _fit_of(cann: Cann, torch_npu: str, said: str) -> Finding:
    released = _RELEASED_FOR.get(torch_npu.partition("+")[0])
    beside = f"; torch_npu {torch_npu} was released for CANN {released}" if released else ""
    if cann.release >= _OLDEST_CANN:
        return Finding("CANN", "ok", f"{said}{beside}")
    oldest = ".".join(map(str, _OLDEST_CANN))
    return Finding(
        "CANN",
        "note",
        f"{said}; torch_npu {torch_npu} is called compatible with CANN {oldest} and later, and"
        " older releases have no HIXL",
        f"install CANN {released or f'{oldest} or later'}",
    )


def _devices() -> list[Finding]:
    """The NPUs, and how torch_npu allocates on them."""
    view = probes.npus()
    if view.problem:
        return [Finding("NPUs", "wrong", f"they can't be looked at: {view.problem}")]
    return [_npus(view.devices), _allocator(view)]


def _npus(devices: tuple[probes.Npu, ...]) -> Finding:
    if not devices:
        return Finding("NPUs", "no", "torch_npu sees none", "npu-smi info; check the driver")
    told = [
        f"npu:{index} {npu.chip} ({product_of(npu.chip).name}, {size(npu.total_bytes)})"
        for index, npu in enumerate(devices)
    ]
    unsupported = {npu.chip for npu in devices if product_of(npu.chip).support is Support.NONE}
    if not unsupported:
        return Finding("NPUs", "ok", ", ".join(told))
    detail = f"{', '.join(told)}: not supported are {', '.join(sorted(unsupported))}"
    return Finding("NPUs", "no", detail, 'LLMConfig.device = "cpu" keeps caches in host memory')


def _settings() -> str:
    settings = ((name, environment_text(name)) for name in _SETTINGS)
    return ", ".join(f"{name}={text}" for name, text in settings if text)


def _allocator(view: probes.NpuView) -> Finding:
    """How torch_npu maps memory, which decides what peers and engines can be given of it."""
    said = _settings() or f"{_SETTINGS[0]} is not set"
    if view.expandable is None:
        detail = f"{said}; not looked at, torch_npu gives no memory: {view.allocator_problem}"
        return Finding("allocator", "note", detail)
    if not view.expandable:
        return Finding("allocator", "ok", f"segments mapped as a whole ({said})")
    return Finding(
        "allocator",
        "note",
        f"expandable segments ({said}): memory is mapped piece by piece. Caches that this library"
        " allocates are not in them. Tensors that you register are: a transfer engine may refuse"
        " to register them, and AscendCL has no IPC key for them, so that no process on this host"
        " can map them",
        f"{_SETTINGS[0]}=expandable_segments:False (vllm-ascend adds True where it is left out), or"
        " let this library allocate the caches",
        (f"export {_SETTINGS[0]}=expandable_segments:False",),
    )


def _device(choice: probes.DeviceChoice) -> Finding:
    if choice.problem:
        # torch_npu refuses some settings, and does not say which variable has them.
        settings = f" ({_settings()})" if _settings() else ""
        return Finding("Placement.DEVICE", "wrong", f"init would fail: {choice.problem}{settings}")
    return Finding("Placement.DEVICE", "ok", f"means {choice.device}: {choice.reason}")

# SPDX-License-Identifier: Apache-2.0
"""Puts the simulated runtime under torch_npu: in this process, and in those it starts."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from ascend_sim.build import SimulatorBuildError, build
from ascend_sim.environment import environment_text, prepend_to_path, update_environment
from ascend_sim.settings import Settings

__all__ = ["activate", "is_active", "prepare_environment"]

_MARK = "ASCEND_SIM_LIBRARIES"
_MODULES = Path(__file__).resolve().parent / "modules"
_RUNTIME = "libascendcl.so"


def is_active() -> bool:
    """Whether this process, or one that started it, has put the simulator under torch_npu."""
    return bool(environment_text(_MARK))


def prepare_environment(settings: Settings) -> Path:
    """Build the simulator and set the environment for processes that start from now on.

    Args:
        settings: What to simulate.

    Returns:
        The directory of its libraries.

    Raises:
        SimulatorBuildError: It can't be built here.
    """
    libraries = build()
    values = settings.as_environment()
    update_environment(
        values
        | {
            _MARK: str(libraries),
            # Programs that only `import torch` get their NPUs by torch's own loading of backends.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
            # With it torch_npu looks for the rest of a CANN installation.
            "ASCEND_HOME_PATH": None,
        }
    )
    prepend_to_path("LD_LIBRARY_PATH", str(libraries))
    prepend_to_path("PYTHONPATH", str(_MODULES))
    seed = f", seed {values['ASCEND_SIM_SEED']}" if settings.scheduler == "random" else ""
    sys.stderr.write(
        f"SIMULATED Ascend runtime: {settings.devices} x {settings.soc} on host memory, scheduler "
        f"{settings.scheduler}{seed}: not an NPU\n"
    )
    return libraries


def activate(
    devices: int = 2,
    memory: int | str = "2GiB",
    scheduler: str = "lazy",
    seed: int | None = None,
    soc: str = "Ascend910B1",
    poison: int | None = 0xA5,
) -> None:
    """Simulate an Ascend runtime in this process and its children. Call it before torch's import.

    A second call changes nothing, nor does one in a process that was started under the simulator.

    Args:
        devices: See `Settings`.
        memory: See `Settings`.
        scheduler: See `Settings`.
        seed: See `Settings`.
        soc: See `Settings`.
        poison: See `Settings`.

    Raises:
        ValueError: A value that can't be simulated.
        SimulatorBuildError: It can't be built here.
        RuntimeError: Too late: torch is imported, or a real runtime is loaded.
    """
    settings = Settings(devices, memory, scheduler, seed, soc, poison)
    if is_active():
        _add_modules()
        return
    if "torch" in sys.modules or "torch_npu" in sys.modules:
        raise RuntimeError(
            "ascend_sim.activate() comes too late: torch is imported already. Call it first, or "
            "start the program by `python -m ascend_sim -- python program.py`"
        )
    loaded = _loaded_runtime()
    if loaded:
        raise RuntimeError(f"a real Ascend runtime is loaded: {loaded}; nothing to simulate")
    libraries = prepare_environment(settings)
    _add_modules()
    # The runtime first: the others are linked with it. They stay loaded under their own names,
    # where torch_npu's loader finds them; LD_LIBRARY_PATH would be too late for this process.
    paths = sorted(libraries.glob("*.so"), key=lambda path: (path.name != _RUNTIME, path.name))
    for path in paths:
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise SimulatorBuildError(f"{path} can't be loaded: {error}") from error


def _add_modules() -> None:
    """Make the module hixl importable, also where something has reset the import path since."""
    if str(_MODULES) not in sys.path:
        sys.path.insert(0, str(_MODULES))


def _loaded_runtime() -> str:
    """Path of a loaded runtime library, "" if there is none."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for line in maps.splitlines():
        if line.endswith(_RUNTIME):
            return line.split(maxsplit=5)[-1]
    return ""

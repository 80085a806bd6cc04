# SPDX-License-Identifier: Apache-2.0
"""Which CANN and which NPU driver are installed, read from the files that say so. Torch-free."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from llm_datadist_torch.values.environment import environment_text

_ASCEND = Path("/usr/local/Ascend")
_INSTALL_INFO = Path("/etc/ascend_install.info")
_HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_HOMES = ("cann", "ascend-toolkit/latest")
"""Where CANN's installers put it: from 8.5 on, and before."""

_RUNNING = re.compile(r"^(?:toolkit|runtime)_running_version=\[(?:[^\]:]*:)?([^\]:]+)\]", re.M)


@dataclass(frozen=True)
class Cann:
    """An installation of CANN.

    Attributes:
        version: Such as "9.1.0" or "8.3.RC1".
        source: The file that says so.
    """

    version: str
    source: str

    @property
    def release(self) -> tuple[int, int]:
        """The first two numbers; (0, 0) for a version without."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def cann_homes() -> list[Path]:
    """Folders in which CANN may be: what ``set_env.sh`` has set first."""
    named = [Path(text) for name in _HOME_VARIABLES if (text := environment_text(name))]
    return [*named, *(_ASCEND / home for home in _HOMES)]


def installed_cann() -> Cann | None:
    """The CANN that programs started here use; None where no file tells of one."""
    found = (_version_in(home) for home in cann_homes())
    return next((cann for cann in found if cann is not None), None)


def npu_driver() -> str:
    """The version of the NPU driver; "" where no file tells of one.

    A container has these files only if they are mounted.
    """
    told = _value(_INSTALL_INFO, "Driver_Install_Path_Param")
    root = Path(told) if told else _ASCEND
    return _value(root / "driver" / "version.info", "Version")


def _version_in(home: Path) -> Cann | None:
    """What the installer has left, or version.cfg of releases before 8.5."""
    folders = [home, home / f"{platform.machine()}-linux"]
    infos = [info for folder in folders for info in _glob(folder, "ascend_*_install.info")]
    # The toolkit first: operators and kernels are packages of their own.
    for info in sorted(infos, key=lambda path: "toolkit" not in path.name):
        if version := _value(info, "version"):
            return Cann(version, str(info))
    running = _RUNNING.search(_text(home / "version.cfg"))
    return Cann(running[1].strip(), str(home / "version.cfg")) if running else None


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _value(path: Path, name: str) -> str:
    """The value of a line ``name=value``; "" without one."""
    found = re.search(rf"^\s*{name}\s*=[ \t]*(\S.*?)\s*$", _text(path), re.M)
    return found[1] if found else ""


def _text(path: Path) -> str:
    try:
        # Such files are ASCII; one that is not must not end a report.
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

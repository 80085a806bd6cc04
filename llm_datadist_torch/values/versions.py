# SPDX-License-Identifier: Apache-2.0
"""What is installed: versions of this library, Python, the kernel, CANN, and packages.

Torch-free: it also describes machines on which torch can't be loaded.
"""

from __future__ import annotations

import platform
from importlib import metadata

from llm_datadist_torch.values.cann import installed_cann, npu_driver
from llm_datadist_torch.values.version import VERSION

_PACKAGES = ("torch", "msgspec", "cryptography", "numpy", "torch_npu")
NOT_INSTALLED = "not installed"
_NOT_FOUND = "not found"


def installed_versions() -> dict[str, str]:
    """Versions by name; :data:`NOT_INSTALLED` for packages that are missing."""
    found = {
        "llm_datadist_torch": VERSION,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "kernel": platform.release(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = NOT_INSTALLED
    cann = installed_cann()
    found["CANN"] = _NOT_FOUND if cann is None else cann.version
    found["NPU driver"] = npu_driver() or _NOT_FOUND
    return found

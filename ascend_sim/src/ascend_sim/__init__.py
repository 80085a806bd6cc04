# SPDX-License-Identifier: Apache-2.0
"""A simulated Ascend runtime on host memory, under which the real torch_npu runs.

``python -m ascend_sim -- python program.py`` needs no change in a program; `activate` does it from
inside one, before torch is imported; ``%load_ext ascend_sim`` does it in a notebook. Importing this
imports no torch. See README.md of the project ascend-sim.
"""

from __future__ import annotations

from ascend_sim import faults
from ascend_sim.activation import activate, is_active
from ascend_sim.build import SimulatorBuildError

__all__ = ["SimulatorBuildError", "activate", "faults", "is_active", "load_ipython_extension"]


def load_ipython_extension(_shell: object) -> None:
    """What ``%load_ext ascend_sim`` calls: `activate`, unless ``ascend-sim`` started the kernel."""
    activate()

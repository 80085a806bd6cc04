# SPDX-License-Identifier: Apache-2.0
"""A simulated Ascend runtime on host memory, under which the real torch_npu runs.

``python -m llm_datadist_torch sim -- python program.py`` needs no change in a program; `activate`
does it from inside one, before torch is imported. Importing this imports no torch.
See docs/ascend_sim.md.
"""

from __future__ import annotations

from llm_datadist_torch.ascend_sim import faults
from llm_datadist_torch.ascend_sim.activation import activate, is_active
from llm_datadist_torch.ascend_sim.build import SimulatorBuildError

__all__ = ["SimulatorBuildError", "activate", "faults", "is_active"]

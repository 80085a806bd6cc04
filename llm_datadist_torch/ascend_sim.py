# SPDX-License-Identifier: Apache-2.0
"""The former place of the simulated Ascend runtime, for one release: import `ascend_sim` instead.

It is the distribution ascend-sim now, which is installed by itself.
"""

from __future__ import annotations

import sys
import warnings

try:
    from ascend_sim import SimulatorBuildError, activate, faults, is_active
except ImportError as error:
    raise ModuleNotFoundError(
        "llm_datadist_torch.ascend_sim is now the distribution ascend-sim, which is not installed:"
        " pip install ascend-sim, and import ascend_sim",
        name="ascend_sim",
    ) from error

__all__ = ["SimulatorBuildError", "activate", "faults", "is_active"]

warnings.warn(
    "llm_datadist_torch.ascend_sim is deprecated and will be removed in the next release; import"
    " ascend_sim, of the distribution ascend-sim",
    DeprecationWarning,
    stacklevel=2,
)
# `import llm_datadist_torch.ascend_sim.faults` is the same module as `ascend_sim.faults`.
sys.modules[f"{__name__}.faults"] = faults

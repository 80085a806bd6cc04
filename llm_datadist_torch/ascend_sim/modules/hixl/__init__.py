# SPDX-License-Identifier: Apache-2.0
"""``import hixl`` for whoever has this directory on ``sys.path``: the simulated transfer engine.

Only the simulator of the Ascend runtime puts it there.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("llm_datadist_torch") is None:
    # It isn't installed: it is where this file is, in a checkout for instance.
    sys.path.append(str(Path(__file__).resolve().parents[4]))

from llm_datadist_torch.ascend_sim.hixl import *  # noqa: F403
from llm_datadist_torch.ascend_sim.hixl import __all__ as __all__

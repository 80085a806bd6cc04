# SPDX-License-Identifier: Apache-2.0
"""``import hixl`` for whoever has this directory on ``sys.path``: the simulated transfer engine.

Only the simulator of the Ascend runtime puts it there.
"""

import importlib.util
import sys
from pathlib import Path

if getattr(importlib.util.find_spec("ascend_sim"), "origin", None) is None:
    # Not installed: it is where this file is, in a checkout for instance. A folder of that name
    # without an __init__.py, such as the project's own, is a package without an origin.
    sys.modules.pop("ascend_sim", None)
    sys.path.append(str(Path(__file__).resolve().parents[3]))

from ascend_sim.hixl import *  # noqa: F403
from ascend_sim.hixl import __all__ as __all__

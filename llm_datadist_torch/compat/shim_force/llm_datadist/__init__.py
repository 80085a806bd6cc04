# SPDX-License-Identifier: Apache-2.0
"""``import llm_datadist`` for programs that have this directory on ``sys.path``.

It replaces an installed package of that name.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("llm_datadist_torch") is None:
    # It isn't installed: it is where this file is, in a checkout for instance.
    sys.path.append(str(Path(__file__).resolve().parents[4]))

from llm_datadist_torch.compat import switch
from llm_datadist_torch.compat.tree import *  # noqa: F403
from llm_datadist_torch.compat.tree import __all__ as __all__
from llm_datadist_torch.compat.tree import __getattr__ as __getattr__
from llm_datadist_torch.compat.tree import __version__ as __version__
from llm_datadist_torch.compat.tree import v2_list as v2_list

__path__ = switch.tree_path()

# SPDX-License-Identifier: Apache-2.0
"""The module `ascend_sim.faults`, imported when a test uses it: real NPUs have no ascend-sim."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("ascend_sim.faults"), name)

# SPDX-License-Identifier: Apache-2.0
"""For programs that say ``import llm_datadist``: the reference's modules (docs/migrating.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_datadist_torch.compat.npu_tensors import create_npu_tensors as create_npu_tensors

__all__ = ["create_npu_tensors"]


def __getattr__(name: str) -> object:
    """Loads it when it is first used: it imports torch, which the package itself must not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("llm_datadist_torch.compat.npu_tensors"), name)

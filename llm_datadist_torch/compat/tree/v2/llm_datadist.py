# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2.llm_datadist``."""

from __future__ import annotations

from llm_datadist_torch.api.datadist import (
    LLMDataDist,
    _shutdown_handler,
)

__all__ = [
    "LLMDataDist",
    "_shutdown_handler",
]

# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2.cache_manager``."""

from __future__ import annotations

from llm_datadist_torch.api.cache_manager import (
    CacheManager,
)

__all__ = [
    "CacheManager",
]

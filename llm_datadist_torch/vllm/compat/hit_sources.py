# SPDX-License-Identifier: Apache-2.0
"""How vLLM counts where cached tokens came from; older versions don't."""

from __future__ import annotations

from typing import Any

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    FROM_PEERS: Any = None
else:
    FROM_PEERS = CacheHitSource.P2P

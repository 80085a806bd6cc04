# SPDX-License-Identifier: Apache-2.0
"""Which KV cache groups are handed over; older versions have none that are not."""

from __future__ import annotations

from llm_datadist_torch.vllm.foreign import VllmObject


def transfer_group_ids(kv_cache_config: VllmObject) -> tuple[int, ...]:
    """Indices of the groups that belong to a request's state."""
    found = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(range(len(kv_cache_config.kv_cache_groups)) if found is None else found)

# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2.llm_types``."""

from __future__ import annotations

from llm_datadist_torch.caches.cache import (
    Cache,
)
from llm_datadist_torch.links.work import CacheTask
from llm_datadist_torch.values.cache_desc import (
    CacheDesc,
)
from llm_datadist_torch.values.checks import (
    check_layer_range,
)
from llm_datadist_torch.values.enums import (
    Memtype,
    Placement,
    PushType,
    RegisterMemStatus,
    int_to_mem_status_dict,
)
from llm_datadist_torch.values.keys import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
)
from llm_datadist_torch.values.kv_cache import (
    KvCache,
)
from llm_datadist_torch.values.mem_info import (
    MemInfo,
)
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "KvCache",
    "LayerSynchronizer",
    "MemInfo",
    "Memtype",
    "Placement",
    "PushType",
    "RegisterMemStatus",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
    "check_layer_range",
    "int_to_mem_status_dict",
]

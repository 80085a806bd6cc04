# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist``: the reference's top level. Every name is the very object of this package."""

from __future__ import annotations

import importlib
from typing import Any

from llm_datadist_torch.api.datadist import LLMDataDist
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.work import CacheTask
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.config import LLMConfig, LlmConfig
from llm_datadist_torch.values.data_type import DataType
from llm_datadist_torch.values.enums import LLMRole, Memtype, Placement, RegisterMemStatus
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.kv_cache import KvCache
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, Status
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
    "DataType",
    "KvCache",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMDataDist",
    "LLMException",
    "LLMRole",
    "LLMStatusCode",
    "LayerSynchronizer",
    "LlmConfig",
    "MemInfo",
    "Memtype",
    "Placement",
    "RegisterMemStatus",
    "Status",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
]

__version__ = "0.0.1"
"""The reference's, for programs that look at it."""

v2_list = list(__all__)

_V1_NAMES = ("KvCacheManager", "Tensor", "TensorDesc")
_V1_PACKAGE = "llm_datadist_v1"


def __getattr__(name: str) -> Any:  # noqa: ANN401 (classes of another package)
    if name in _V1_NAMES:
        try:
            return getattr(importlib.import_module(_V1_PACKAGE), name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} belongs to the v1 API, package {_V1_PACKAGE}, which isn't installed: use"
                " LLMDataDist.cache_manager and Cache, or install that package",
                name=_V1_PACKAGE,
            ) from error
    raise AttributeError(f"module 'llm_datadist' has no attribute {name!r}")

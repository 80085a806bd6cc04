# SPDX-License-Identifier: Apache-2.0
"""KV caches that are PyTorch tensors, with the API of Huawei's LLM-DataDist.

Importing this package starts nothing, touches no device and reads no environment variable.
"""

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.cache_manager import CacheManager
from llm_datadist_torch.compat.switch import install as install
from llm_datadist_torch.config import LLMConfig, LlmConfig
from llm_datadist_torch.datadist import LLMDataDist
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.data_type import DataType
from llm_datadist_torch.values.enums import LLMRole, Memtype, Placement, RegisterMemStatus
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.kv_cache import KvCache
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import (
    LLMCacheNotFoundError,
    LLMDeviceError,
    LLMException,
    LLMFeatureNotEnabledError,
    LLMLinkError,
    LLMNotLinkedError,
    LLMOutOfMemoryError,
    LLMParamError,
    LLMPeerLostError,
    LLMStatusCode,
    LLMTimeoutError,
    Status,
)
from llm_datadist_torch.values.synchronizers import EventSynchronizer
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.work import CacheTask

__version__ = "0.1.0"

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheManager",
    "CacheTask",
    "DataType",
    "EventSynchronizer",
    "KvCache",
    "LLMCacheNotFoundError",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMDataDist",
    "LLMDeviceError",
    "LLMException",
    "LLMFeatureNotEnabledError",
    "LLMLinkError",
    "LLMNotLinkedError",
    "LLMOutOfMemoryError",
    "LLMParamError",
    "LLMPeerLostError",
    "LLMRole",
    "LLMStatusCode",
    "LLMTimeoutError",
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

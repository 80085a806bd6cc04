# SPDX-License-Identifier: Apache-2.0
"""The public names that a program uses before it has an instance, and the exceptions.

The package loads all of them when one is first used, so that importing it is free. The other public
names are in :mod:`llm_datadist_torch.public_working`.
"""

from llm_datadist_torch.api.datadist import LLMDataDist as LLMDataDist
from llm_datadist_torch.api.keys import BlocksKey as BlocksKey
from llm_datadist_torch.api.keys import PrefixKey as PrefixKey
from llm_datadist_torch.api.keys import RequestKey as RequestKey
from llm_datadist_torch.api.keys import RowKey as RowKey
from llm_datadist_torch.links.events import LinkEvent as LinkEvent
from llm_datadist_torch.links.events import LinkListener as LinkListener
from llm_datadist_torch.observe.plots import plot_links as plot_links
from llm_datadist_torch.observe.plots import plot_pool as plot_pool
from llm_datadist_torch.observe.plots import plot_transfers as plot_transfers
from llm_datadist_torch.observe.stats import Stats as Stats
from llm_datadist_torch.values.cache_desc import CacheDesc as CacheDesc
from llm_datadist_torch.values.cluster_info import LLMClusterInfo as LLMClusterInfo
from llm_datadist_torch.values.config import LLMConfig as LLMConfig
from llm_datadist_torch.values.config import LlmConfig as LlmConfig
from llm_datadist_torch.values.data_type import DataType as DataType
from llm_datadist_torch.values.enums import LLMRole as LLMRole
from llm_datadist_torch.values.enums import Memtype as Memtype
from llm_datadist_torch.values.enums import Placement as Placement
from llm_datadist_torch.values.enums import RegisterMemStatus as RegisterMemStatus
from llm_datadist_torch.values.keys import BlocksCacheKey as BlocksCacheKey
from llm_datadist_torch.values.keys import CacheKey as CacheKey
from llm_datadist_torch.values.keys import CacheKeyByIdAndIndex as CacheKeyByIdAndIndex
from llm_datadist_torch.values.kv_cache import KvCache as KvCache
from llm_datadist_torch.values.mem_info import MemInfo as MemInfo
from llm_datadist_torch.values.status import LLMCacheNotFoundError as LLMCacheNotFoundError
from llm_datadist_torch.values.status import LLMDeviceError as LLMDeviceError
from llm_datadist_torch.values.status import LLMException as LLMException
from llm_datadist_torch.values.status import LLMFeatureNotEnabledError as LLMFeatureNotEnabledError
from llm_datadist_torch.values.status import LLMLinkError as LLMLinkError
from llm_datadist_torch.values.status import LLMLoadError as LLMLoadError
from llm_datadist_torch.values.status import LLMNotLinkedError as LLMNotLinkedError
from llm_datadist_torch.values.status import LLMOutOfMemoryError as LLMOutOfMemoryError
from llm_datadist_torch.values.status import LLMParamError as LLMParamError
from llm_datadist_torch.values.status import LLMPeerLostError as LLMPeerLostError
from llm_datadist_torch.values.status import LLMStatusCode as LLMStatusCode
from llm_datadist_torch.values.status import LLMTimeoutError as LLMTimeoutError
from llm_datadist_torch.values.status import Status as Status
from llm_datadist_torch.values.synchronizers import EventSynchronizer as EventSynchronizer
from llm_datadist_torch.values.transfer import LayerSynchronizer as LayerSynchronizer
from llm_datadist_torch.values.transfer import TransferConfig as TransferConfig
from llm_datadist_torch.values.transfer import (
    TransferWithCacheKeyConfig as TransferWithCacheKeyConfig,
)

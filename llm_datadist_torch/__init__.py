# SPDX-License-Identifier: Apache-2.0
"""KV caches that are PyTorch tensors, with the API of Huawei's LLM-DataDist.

Importing this package starts nothing, touches no device and reads no environment variable. It does
not even import torch: the public names do, on first use, because where torch_npu is installed, the
simulated Ascend runtime and the tools that explain a missing one must come before torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llm_datadist_torch.compat.switch import install as install
from llm_datadist_torch.values import version

if TYPE_CHECKING:
    from llm_datadist_torch.public import *  # noqa: F403
    from llm_datadist_torch.public_working import *  # noqa: F403

__version__ = version.VERSION

__all__ = [
    "BlocksCacheKey",
    "BlocksKey",
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
    "LLMLoadError",
    "LLMNotLinkedError",
    "LLMOutOfMemoryError",
    "LLMParamError",
    "LLMPeerLostError",
    "LLMRole",
    "LLMStatusCode",
    "LLMTimeoutError",
    "LayerPull",
    "LayerPush",
    "LayerSynchronizer",
    "LinkEvent",
    "LinkInfo",
    "LinkListener",
    "LlmConfig",
    "MemInfo",
    "Memtype",
    "Node",
    "Peer",
    "Placement",
    "PrefixKey",
    "PreparedTransfer",
    "RegisterMemStatus",
    "RequestKey",
    "RowKey",
    "Stats",
    "Status",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
    "plot_links",
    "plot_pool",
    "plot_transfers",
]


# Public as well, but left alone by `import *`: Python's own is meant where nothing is said.
_NOT_STARRED = ("open",)
# The modules that have the public names, those first that load little.
_PUBLIC = ("public", "public_working")


def __getattr__(name: str) -> object:
    """Loads the public names of a module when the first of them is used."""
    if name == "LLMLoadError":  # for those who catch it where nothing else can be loaded
        return importlib.import_module("llm_datadist_torch.values.status").LLMLoadError
    if name == "_C":
        return importlib.import_module("llm_datadist_torch.values.loading").load_extension()
    if name == "ops":
        return importlib.import_module("llm_datadist_torch.ops")
    if name not in __all__ and name not in _NOT_STARRED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("llm_datadist_torch.values.loading").load_extension()
    for part in _PUBLIC:
        values = vars(importlib.import_module(f"{__name__}.{part}"))
        globals().update(
            {each: values[each] for each in (*__all__, *_NOT_STARRED) if each in values}
        )
        if name in globals():
            break
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NOT_STARRED})

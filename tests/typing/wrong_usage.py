# SPDX-License-Identifier: Apache-2.0
"""Mistakes that mypy and pyright must find: an ignore comment that is not needed is an error."""

from __future__ import annotations

import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheManager,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    TransferConfig,
)


def wrong(manager: CacheManager, cache: Cache, datadist: LLMDataDist) -> None:
    config = LLMConfig()
    config.enable_cache_manager = "1"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    config.link_retry_count = "3"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    config.options = {}  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    LLMDataDist("prompt", 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    datadist.init(config)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    datadist.link_clusters(LLMClusterInfo())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CacheDesc(2, 16, torch.int8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CacheDesc(2, [16], "int8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CacheKey(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    CacheKey(1, 2, request_id=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    BlocksCacheKey("1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    CacheKeyByIdAndIndex(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.allocate_cache(CacheDesc(2, [16], torch.int8), CacheKey(1, 2))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.register_cache(CacheDesc(2, [16], torch.int8), ["0x10"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.pull_cache(BlocksCacheKey(1), cache)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.pull_cache(CacheKey(1, 2), cache, src_layer_range=(0, 1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.pull_blocks(BlocksCacheKey(1), cache, src_layer_rnage=range(1))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.push_cache(CacheKey(1, 2), cache)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.swap_blocks(cache, cache, [(0, 1)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    cache.cache_id = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    LayerSynchronizer()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
    TransferConfig(1, 4096)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    datadist.switch_role(LLMRole.PROMPT, 26000)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def wrong_awaits(manager: CacheManager, cache: Cache) -> None:
    await manager.pull_cache(CacheKey(1, 2), cache)  # type: ignore[misc, func-returns-value]  # pyright: ignore[reportGeneralTypeIssues]
    manager.pull_cache_async(CacheKey(1, 2), cache) + 1  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]

# SPDX-License-Identifier: Apache-2.0
"""From the front door's arguments to the operations of ``CacheManager``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_datadist_torch.api.cache_manager import CacheManager
from llm_datadist_torch.api.keys import BlocksKey, KeyLike, RowKey, as_key
from llm_datadist_torch.api.transfer import PreparedTransfer
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.movement import ops
from llm_datadist_torch.values.checks import check_isinstance, param_error

Blocks = Sequence[int] | torch.Tensor


def pull(
    manager: CacheManager,
    cluster_id: int,
    key: KeyLike,
    into: Cache,
    src_blocks: Blocks | None,
    dst_blocks: Blocks | None,
    row: int,
    layers: range | None,
    dst_layers: range | None,
) -> PreparedTransfer:
    """A pull, with the arguments of ``Peer.pull``.

    Raises:
        TypeError: Wrong types.
        LLMParamError: Arguments that contradict each other.
    """
    key = as_key(key)
    check_isinstance("into", into, Cache, allow_none=False)
    arguments: dict[str, Any] = _layer_arguments(into, layers, dst_layers)
    if not into.is_blocks_cache:
        if isinstance(key, BlocksKey):
            raise param_error(
                f"{key!r} names a blocks cache, but into is a contiguous one",
                remedy="pull a RequestKey, PrefixKey or RowKey, or into a blocks cache.",
            )
        _check_row_only("into", src_blocks, dst_blocks)
        arguments |= {"cache_key": key.at(cluster_id), "cache": into, "batch_index": row}
        return PreparedTransfer(cluster_id, manager.pull_cache, manager.pull_cache_async, arguments)
    _check_no_row("into", row)
    arguments |= {"src_cache_key": key.at(cluster_id), "dst_cache": into}
    arguments |= _block_arguments(into, src_blocks, dst_blocks)
    if not isinstance(key, BlocksKey):
        if src_blocks is not None:
            raise param_error(f"src_blocks given, but {key!r} names a row, which is cut in order")
        arguments["src_blocks"] = ()
    return PreparedTransfer(cluster_id, manager.pull_blocks, manager.pull_blocks_async, arguments)


def push(
    manager: CacheManager,
    cluster_id: int,
    key: KeyLike,
    source: Cache,
    src_blocks: Blocks | None,
    dst_blocks: Blocks | None,
    row: int,
    layers: range | None,
    dst_layers: range | None,
) -> PreparedTransfer:
    """A push, with the arguments of ``Peer.push``.

    Raises:
        TypeError: Wrong types.
        LLMParamError: Arguments that contradict each other.
    """
    key = as_key(key)
    check_isinstance("source", source, Cache, allow_none=False)
    wanted = BlocksKey if source.is_blocks_cache else RowKey
    if not isinstance(key, wanted):
        kind = "a blocks cache" if source.is_blocks_cache else "a contiguous cache"
        raise param_error(f"{key!r} names nothing that {kind} can be pushed to", remedy=_PUSH_TO)
    arguments: dict[str, Any] = _layer_arguments(source, layers, dst_layers)
    arguments |= {"dst_cache_key": key.at(cluster_id), "src_cache": source}
    if not source.is_blocks_cache:
        _check_row_only("source", src_blocks, dst_blocks)
        arguments["src_batch_index"] = row
        return PreparedTransfer(cluster_id, manager.push_cache, manager.push_cache_async, arguments)
    _check_no_row("source", row)
    arguments |= _block_arguments(source, src_blocks, dst_blocks)
    return PreparedTransfer(cluster_id, manager.push_blocks, manager.push_blocks_async, arguments)


_PUSH_TO = "push blocks to a name or BlocksKey, a row to a RowKey."


def once(
    src_blocks: Blocks | None, dst_blocks: Blocks | None
) -> tuple[Blocks | None, Blocks | None]:
    """Blocks that are used many times: converted once, and not the caller's own any more.

    Raises:
        TypeError, ValueError: Not ints, or not one-dimensional.
    """
    src = None if src_blocks is None else ops.as_ids(src_blocks, "src_blocks")
    return src, None if dst_blocks is None else ops.as_ids(dst_blocks, "dst_blocks")


def layer_range(cache: Cache, layers: range | None) -> range:
    """The layers that are meant by ``layers`` of a cache.

    Raises:
        TypeError: No range.
        LLMParamError: It is empty, has a step, or is not within the cache.
    """
    count = cache.cache_desc.num_tensors // cache.tensors_per_layer
    if layers is None:
        return range(count)
    check_isinstance("layers", layers, range)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise param_error(f"layers={layers} is not a range without a step within [0, {count})")
    return layers


def _block_arguments(
    cache: Cache, src_blocks: Blocks | None, dst_blocks: Blocks | None
) -> dict[str, Any]:
    """Blocks that were not given are those of the other side, or all of our cache."""
    if src_blocks is None:
        src_blocks = dst_blocks
    if src_blocks is None:
        src_blocks = torch.arange(cache.layout.rows)
    return {
        "src_blocks": src_blocks,
        "dst_blocks": src_blocks if dst_blocks is None else dst_blocks,
    }


def _layer_arguments(
    cache: Cache, layers: range | None, dst_layers: range | None
) -> dict[str, Any]:
    return {
        "src_layer_range": layers,
        "dst_layer_range": layers if dst_layers is None else dst_layers,
        "tensor_num_per_layer": cache.tensors_per_layer,
    }


def _check_row_only(name: str, src_blocks: Blocks | None, dst_blocks: Blocks | None) -> None:
    if src_blocks is not None or dst_blocks is not None:
        raise param_error(f"blocks given, but {name} is a contiguous cache", remedy="give row.")


def _check_no_row(name: str, row: int) -> None:
    if row:
        raise param_error(f"row={row}, but {name} is a blocks cache", remedy="give blocks.")

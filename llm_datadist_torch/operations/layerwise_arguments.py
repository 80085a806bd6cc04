# SPDX-License-Identifier: Apache-2.0
"""Argument checks of ``transfer_cache_async``, in the reference's order (10.1).

What is checked here is raised by the call. What depends on the source's memory or on the peer is
reported by the task (10.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_datadist_torch import ops
from llm_datadist_torch.cache import Cache
from llm_datadist_torch.memory.address import address_tensor
from llm_datadist_torch.values.checks import (
    INT64_MAX,
    check_isinstance,
    check_list_uint64,
    check_uint64,
    layer_count,
    param_error,
)
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

PER_LAYER = 2
"""Tensors of a layer, fixed for ``transfer_cache_async`` (reference API, 13)."""

Indices = Sequence[int] | torch.Tensor | None
Config = TransferConfig | TransferWithCacheKeyConfig


@dataclass(frozen=True)
class Target:
    """One config as it was when the call was made.

    Attributes:
        layers: Layers of the source to send.
        row: Row of the source.
        cluster_id: The peer.
        key: The peer's cache, with ``first_layer``; or None, with ``addrs``.
        first_layer: The peer's layer that gets the first of ``layers``.
        addrs: Addresses at the peer, int64, two for each layer.
    """

    layers: range
    row: int
    cluster_id: int
    key: BlocksCacheKey | CacheKeyByIdAndIndex | None = None
    first_layer: int = 0
    addrs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layerwise:
    """A checked call of ``transfer_cache_async``.

    Attributes:
        cache: The source.
        synchronizer: Says when a layer is ready.
        targets: One per config.
        src_ids: Blocks of the source, int64 [n], or None.
        dst_ids: Blocks at the peer, int64 [n], or None.
        block_bytes: Bytes of a block at the peer; 0 where it wasn't given.
    """

    cache: Cache
    synchronizer: LayerSynchronizer
    targets: tuple[Target, ...]
    src_ids: torch.Tensor | None
    dst_ids: torch.Tensor | None
    block_bytes: int

    @property
    def layers_wanted(self) -> list[int]:
        """Layers that some config wants, in their order."""
        return sorted({layer for target in self.targets for layer in target.layers})


def transfer_cache_async(
    src_cache: Cache,
    layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[Config],
    src_block_indices: Indices,
    dst_block_indices: Indices,
    dst_block_memory_size: int | None,
) -> Layerwise:
    """Check the arguments of ``transfer_cache_async``."""
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    if src_cache.cache_desc.placement == Placement.HOST:
        raise param_error("src_cache is in host memory, its placement must be DEVICE")
    dst_ids = _indices("dst_block_indices", dst_block_indices)
    src_ids = _indices("src_block_indices", src_block_indices)
    if dst_block_memory_size is not None:
        dst_block_memory_size = check_uint64("dst_block_memory_size", dst_block_memory_size)
    _check_indices(src_ids, dst_ids, dst_block_memory_size)
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    kinds = (TransferConfig, TransferWithCacheKeyConfig)
    check_isinstance("transfer_configs", transfer_configs, (list, tuple), kinds, allow_none=False)
    if dst_ids is None and dst_block_memory_size:
        raise param_error(
            f"dst_block_memory_size={dst_block_memory_size} without dst_block_indices"
        )
    num_tensors = src_cache.layout.num_tensors
    if num_tensors % PER_LAYER:
        raise param_error(f"src_cache has {num_tensors} tensors, {PER_LAYER} per layer are needed")
    targets = tuple(
        _target(f"transfer_configs[{i}]", config, src_cache, with_blocks=src_ids is not None)
        for i, config in enumerate(transfer_configs)
    )
    return Layerwise(
        src_cache, layer_synchronizer, targets, src_ids, dst_ids, dst_block_memory_size or 0
    )


def _indices(name: str, indices: Indices) -> torch.Tensor | None:
    """Block ids as an int64 tensor [n]; None where none are given."""
    check_isinstance(name, indices, (list, tuple, torch.Tensor))
    if indices is None or not len(indices):
        return None
    if not isinstance(indices, torch.Tensor):
        # No cache has that many blocks; the range check will say so.
        indices = [min(int(index), INT64_MAX) for index in check_list_uint64(name, indices)]
    ids = ops.as_ids(indices, name)
    if int(ids.min()) < 0:
        raise ValueError(f"{name}[{int(ids.argmin())}]={int(ids.min())} is negative")
    return ids


def _check_indices(
    src_ids: torch.Tensor | None, dst_ids: torch.Tensor | None, block_bytes: int | None
) -> None:
    if src_ids is not None:
        if dst_ids is None:
            raise param_error("src_block_indices without dst_block_indices")
        if len(src_ids) != len(dst_ids):
            raise param_error(
                f"{len(src_ids)} src_block_indices for {len(dst_ids)} dst_block_indices"
            )
    elif dst_ids is not None and block_bytes is None:
        raise param_error("dst_block_indices without src_block_indices need dst_block_memory_size")


def _target(name: str, config: Config, cache: Cache, *, with_blocks: bool) -> Target:
    """A config, checked again as a whole, for its setters look at one value at a time."""
    num_layers = cache.layout.num_tensors // PER_LAYER
    layers = range(num_layers) if config.src_layer_range is None else config.src_layer_range
    if with_blocks and config.src_batch_index != 0:
        raise param_error(
            f"{name}.src_batch_index={config.src_batch_index} must be 0 with src_block_indices"
        )
    if not 0 <= layers.start < layers.stop <= num_layers:
        raise param_error(f"{name}.src_layer_range={layers} is not within [0, {num_layers})")
    if isinstance(config, TransferConfig):
        target = _address_target(name, config, layers)
    else:
        target = _key_target(name, config, layers)
    if cache.is_blocks_cache and not with_blocks:
        raise param_error(
            "src_cache is a blocks cache: which blocks are to be sent?",
            remedy="give src_block_indices and dst_block_indices.",
        )
    return target


def _address_target(name: str, config: TransferConfig, layers: range) -> Target:
    wanted = PER_LAYER * layer_count(layers)
    if len(config.dst_addrs) != wanted:
        raise param_error(
            f"{name}.dst_addrs has {len(config.dst_addrs)} addresses for {layer_count(layers)}"
            f" layers, {wanted} are needed"
        )
    addrs = tuple(address_tensor(config.dst_addrs).tolist())
    return Target(layers, config.src_batch_index, config.dst_cluster_id, addrs=addrs)


def _key_target(name: str, config: TransferWithCacheKeyConfig, layers: range) -> Target:
    key, dst = config.cache_key, config.dst_layer_range
    if key is None or dst is None:
        missing = "cache_key" if key is None else "dst_layer_range"
        raise TypeError(f"{name}.{missing} is None")
    if layer_count(layers) != layer_count(dst):
        raise param_error(
            f"{name}: src_layer_range={layers} and dst_layer_range={dst} differ in length"
        )
    if isinstance(key, BlocksCacheKey) and config.src_batch_index != 0:
        raise param_error(
            f"{name}.src_batch_index={config.src_batch_index} must be 0 with a BlocksCacheKey"
        )
    # The key says which peer; ``dst_cluster_id`` may be that of an earlier key.
    return Target(layers, config.src_batch_index, key.cluster_id, key=key, first_layer=dst.start)

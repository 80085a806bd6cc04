# SPDX-License-Identifier: Apache-2.0
"""``transfer_cache_async``: layers go to their targets as they become ready (reference API, 10).

What is checked by the constructor is raised by the call (10.1). What depends on the source's memory
or on the peer is reported by the task (10.3).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.work import CacheTask, StopWorkError, Work, as_failure
from llm_datadist_torch.memory.address import address_tensor
from llm_datadist_torch.movement import background, geometry
from llm_datadist_torch.movement.pushes import check_remote_tensors
from llm_datadist_torch.movement.remote import AddressKey, RemoteCache
from llm_datadist_torch.movement.transfer import Plan, Plans, Push
from llm_datadist_torch.values.checks import (
    INT64_MAX,
    as_ids,
    check_isinstance,
    check_list_uint64,
    check_timeout_ms,
    check_uint64,
    layer_count,
    param_error,
)
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.layout import Layout
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

logger = logging.getLogger("llm_datadist_torch")

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


class Layerwise:
    """One call of ``transfer_cache_async``, its arguments checked in the reference's order.

    Args:
        instance: Whose call it is.
        src_cache: The source; see ``CacheManager.transfer_cache_async``, also for the others.
        layer_synchronizer: Says when a layer is ready.
        transfer_configs: Where to send.
        src_block_indices: Blocks of the source.
        dst_block_indices: Blocks at the peer.
        dst_block_memory_size: Bytes of a block at the peer.

    Attributes:
        instance: Whose call it is.
        cache: The source.
        synchronizer: Says when a layer is ready.
        targets: One per config.
        src_ids: Blocks of the source, int64 [n], or None.
        dst_ids: Blocks at the peer, int64 [n], or None.
        block_bytes: Bytes of a block at the peer; 0 where it wasn't given.
    """

    def __init__(
        self,
        instance: Instance,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[Config],
        src_block_indices: Indices,
        dst_block_indices: Indices,
        dst_block_memory_size: int | None,
    ) -> None:
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        if src_cache.cache_desc.placement == Placement.HOST:
            raise param_error("src_cache is in host memory, its placement must be DEVICE")
        self.dst_ids = _indices("dst_block_indices", dst_block_indices)
        self.src_ids = _indices("src_block_indices", src_block_indices)
        if dst_block_memory_size is not None:
            dst_block_memory_size = check_uint64("dst_block_memory_size", dst_block_memory_size)
        _check_indices(self.src_ids, self.dst_ids, dst_block_memory_size)
        if src_cache.is_blocks_cache and self.dst_ids is None:
            # All of it, block by block; the reference sends the first block only.
            self.src_ids = self.dst_ids = torch.arange(src_cache.layout.rows)
        check_isinstance(
            "layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False
        )
        kinds = (TransferConfig, TransferWithCacheKeyConfig)
        check_isinstance(
            "transfer_configs", transfer_configs, (list, tuple), kinds, allow_none=False
        )
        if self.dst_ids is None and dst_block_memory_size:
            raise param_error(
                f"dst_block_memory_size={dst_block_memory_size} without dst_block_indices"
            )
        num_tensors = src_cache.layout.num_tensors
        if num_tensors % PER_LAYER:
            raise param_error(
                f"src_cache has {num_tensors} tensors, {PER_LAYER} per layer are needed"
            )
        self.targets = tuple(
            _target(
                f"transfer_configs[{i}]", config, src_cache, with_blocks=self.src_ids is not None
            )
            for i, config in enumerate(transfer_configs)
        )
        self.instance = instance
        self.cache = src_cache
        self.synchronizer = layer_synchronizer
        self.block_bytes = dst_block_memory_size or 0

    def start(self, timeout: int | None = None) -> CacheTask:
        """Start in the background. Holds a lease on the source until the task is done.

        Layers, and the configs of a layer, go one after the other.

        Args:
            timeout: What each layer may take to be sent to one target, in milliseconds.

        Raises:
            TypeError, ValueError, LLMParamError: ``timeout`` is not a time.
        """
        timeout_ms = None if timeout is None else check_timeout_ms(timeout)
        layers = sorted({layer for target in self.targets for layer in target.layers})

        def job(work: Work, entry: CacheEntry) -> None:
            for layer in layers:
                self._send_layer(entry, layer, work, timeout_ms)

        return background.start(
            self.instance,
            self.instance.layer_workers,
            self.cache,
            job,
            num_results=len(self.targets),
            layers_total=len(layers),
        )

    # -- the job ----------------------------------------------------------------------------------

    def _send_layer(
        self, entry: CacheEntry, layer: int, work: Work, timeout_ms: int | None
    ) -> None:
        """Wait for one layer and send it to all that want it.

        Layers that nobody wants any more are skipped.

        Raises:
            StopWorkError: The work has been cancelled, or the synchronizer is broken.
        """
        wanting = [
            index
            for index, target in enumerate(self.targets)
            if layer in target.layers and work.results[index] is None
        ]
        if not wanting:
            return
        work.check()
        if not self._ready(layer, wanting, work):
            return
        for index in wanting:
            target = self.targets[index]
            with work.step(index):
                sent = background.attempt(
                    work, index, partial(self._send, entry, target, layer, timeout_ms)
                )
                if sent and layer == target.layers[-1]:
                    work.succeed(index)
        work.layers_done += 1

    def _ready(self, layer: int, wanting: list[int], work: Work) -> bool:
        """Ask the synchronizer. If it answers False, only the configs that want the layer fail."""
        try:
            ready = self.synchronizer.synchronize_layer(layer, None)
        except Exception as error:
            # It is not asked again: it is broken, not late.
            logger.exception("the synchronizer raised at layer %d", layer)
            failure = as_failure(error)
            for index in wanting:
                work.fail(index, failure)
            raise StopWorkError from error
        work.check()
        if ready:
            return True
        for index in wanting:
            work.fail(
                index,
                param_error(f"the synchronizer said that layer {layer} of the source is not ready"),
            )
        return False

    def _send(self, entry: CacheEntry, target: Target, layer: int, timeout_ms: int | None) -> None:
        """Send one layer to one target. Blocks, at most for ``timeout_ms``."""
        at = layer - target.layers.start
        if target.key is not None:
            by_key = _LayerByKey(self, target, target.key, layer, target.first_layer + at)
            by_key.check_peer()
            by_key.run_leased(entry, timeout_ms=timeout_ms)
            return
        rest = target.addrs[at * PER_LAYER : (at + 1) * PER_LAYER]
        tensor = layer * PER_LAYER
        while rest:
            # Usually one cache has them all, and this is done once.
            by_address = _LayerByAddress(self, target, tensor, rest)
            by_address.check_peer()
            by_address.run_leased(entry, timeout_ms=timeout_ms)
            tensor, rest = tensor + by_address.sent, rest[by_address.sent :]


# -- what moves -----------------------------------------------------------------------------------


class _Layer(Push):
    """Tensors of one layer to one target."""

    operation = "transfer_cache_async"

    def __init__(
        self,
        call: Layerwise,
        target: Target,
        key: BlocksCacheKey | CacheKeyByIdAndIndex | AddressKey,
        paged: bool | None,
    ) -> None:
        super().__init__(call.instance, key, call.cache, paged)
        self._call = call
        self._target = target

    def check_local(self, local: Layout) -> None:
        """The checks of 10.3 that need only the source."""
        call = self._call
        if call.src_ids is not None:
            if not local.paged:
                raise param_error("src_block_indices are given, but src_cache is contiguous")
            geometry.check_rows("src_block_indices", call.src_ids, local)
            if call.block_bytes not in (0, local.row_bytes):
                raise param_error(
                    f"dst_block_memory_size={call.block_bytes}, but blocks of src_cache have"
                    f" {local.row_bytes} bytes"
                )
            return
        geometry.check_row("src_batch_index", self._target.row, local)
        if call.dst_ids is not None and not 0 < call.block_bytes < local.rows * local.row_bytes:
            raise param_error(
                f"dst_block_memory_size={call.block_bytes} must be more than 0 and less than a"
                f" tensor of src_cache, {local.rows * local.row_bytes} bytes"
            )

    def _runs(self, dst: Layout, dst_row: int, src: Layout) -> torch.Tensor:
        """Which bytes of a tensor go where (the table of 10.3), local side first."""
        call, row = self._call, self._target.row
        if call.dst_ids is None:
            runs = geometry.row_to_row(dst, src, dst_row, row, src.row_bytes)
        else:
            geometry.check_rows("dst_blocks", call.dst_ids, dst, unique=True)
            if call.src_ids is None:
                runs = geometry.row_to_blocks(dst, src, call.dst_ids, row)
            else:
                runs = geometry.blocks_to_blocks(dst, src, call.dst_ids, call.src_ids)
        return geometry.local_first(runs)


class _LayerByKey(_Layer):
    """A layer of the source to a layer of the cache that a key names."""

    def __init__(
        self,
        call: Layerwise,
        target: Target,
        key: BlocksCacheKey | CacheKeyByIdAndIndex,
        layer: int,
        dst_layer: int,
    ) -> None:
        # Block indices need blocks; a row may also go to a block that has room for it.
        super().__init__(call, target, key, None if call.dst_ids is None else True)
        self._needs_first_row = not isinstance(key, BlocksCacheKey)
        self._src = range(layer * PER_LAYER, (layer + 1) * PER_LAYER)
        self._dst = range(dst_layer * PER_LAYER, (dst_layer + 1) * PER_LAYER)

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`."""
        check_remote_tensors(self._dst, remote)
        row = remote.view.row
        if self._call.dst_ids is not None:
            if row != 0 and self._needs_first_row:
                raise param_error(f"batch_index={row} of the key must be 0 with dst_block_indices")
            if self._call.block_bytes not in (0, remote.layout.row_bytes):
                raise _other_size(self._call.block_bytes, remote.layout)
        return (Plan(self._src, self._dst, self._runs(remote.layout, row, local)),)


class _LayerByAddress(_Layer):
    """Tensors from ``tensor`` on to the first of ``addrs`` that lie in one cache.

    Attributes:
        sent: How many of the addresses the transfer has covered.
    """

    def __init__(
        self, call: Layerwise, target: Target, tensor: int, addrs: tuple[int, ...]
    ) -> None:
        super().__init__(call, target, AddressKey(target.cluster_id, addrs[0]), None)
        self._tensor = tensor
        self._addrs = addrs
        self.sent = 0

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`."""
        pieces = []
        for src, address in enumerate(self._addrs, self._tensor):
            dst = remote.layout.tensor_at(remote.addrs, address)
            if dst is None:
                break
            offset = address - int(remote.addrs[dst])
            runs = self._runs(self._window(remote.layout, offset, local), 0, local)
            runs[:, 1] += offset
            pieces.append(Plan(range(src, src + 1), range(dst, dst + 1), runs))
        if not pieces:
            raise error_for(
                LLMStatusCode.LLM_FAILED, f"the peer named a cache without {self._addrs[0]:#x}"
            )
        self.sent = len(pieces)
        return pieces

    def _window(self, remote: Layout, offset: int, local: Layout) -> Layout:
        """What of a peer's tensor is reachable from ``offset`` on, as the layout written to.

        Blocks are counted from there. Where the rows lie apart, an address means one row, or (with
        indices) the blocks from the one that it begins.

        Raises:
            LLMParamError: The blocks differ in size.
        """
        call, distance = self._call, remote.row_stride_bytes
        dense = distance == remote.row_bytes
        if call.dst_ids is None:
            room = remote.extent - offset if dense else remote.row_bytes - offset % distance
            return Layout(1, 1, room, room, paged=False)
        size = call.block_bytes or local.row_bytes
        if (remote.paged or not dense) and size != remote.row_bytes:
            raise _other_size(size, remote)
        step = size if dense else distance
        if not dense and offset % step:
            raise param_error("an address in dst_addrs lies inside a block, not at its beginning")
        return Layout(1, (remote.extent - offset + step - size) // step, size, step, paged=True)


def _other_size(size: int, remote: Layout) -> LLMException:
    return param_error(
        f"blocks of {size} bytes are sent, those of the peer have {remote.row_bytes} bytes"
    )


# -- arguments ------------------------------------------------------------------------------------


def _indices(name: str, indices: Indices) -> torch.Tensor | None:
    """Block ids as an int64 tensor [n]; None where none are given."""
    check_isinstance(name, indices, (list, tuple, torch.Tensor))
    if indices is None or not len(indices):
        return None
    if not isinstance(indices, torch.Tensor):
        # No cache has that many blocks; the range check will say so.
        indices = [min(int(index), INT64_MAX) for index in check_list_uint64(name, indices)]
    ids = as_ids(indices, name)
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
            "src_cache is a blocks cache, and dst_block_indices are given: which blocks are sent?",
            remedy="give src_block_indices, too; or neither, for all blocks.",
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

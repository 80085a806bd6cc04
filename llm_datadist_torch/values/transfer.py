# SPDX-License-Identifier: Apache-2.0
"""What transfer_cache_async is told: targets, layer ranges, and who says that a layer is ready."""

from __future__ import annotations

from abc import ABC, abstractmethod

from llm_datadist_torch.values.checks import (
    check_addresses,
    check_isinstance,
    check_layer_range,
    check_uint32,
    check_uint64,
    layer_count,
    param_error,
    shown,
)
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKeyByIdAndIndex


class LayerSynchronizer(ABC):
    """Says when a layer of the source cache may be sent."""

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Blocks until the layer is complete in memory.

        Args:
            layer_index: layer of the source cache, from 0.
            timeout_in_millis: how long to wait at most, None for as long as it takes.

        Returns:
            Whether the layer is ready; False fails the transfer.
        """


class TransferConfig:
    """One target of a transfer, by addresses (reference API, 7.4).

    Args:
        dst_cluster_id: cluster id of the peer, uint64.
        dst_addrs: list or tuple of the peer's addresses, two for each layer sent.
        src_layer_range: layers of the source to send, None for all.
        src_batch_index: row of the source, uint32.

    Each may be set later, with the same checks.

    Raises:
        TypeError: an argument of a wrong type (a bool is not an address).
        ValueError: an int outside its width.
        LLMParamError: a range that is empty, negative or has a step.
    """

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: list[int] | tuple[int, ...],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index
        self.dst_layer_range: range | None = None

    @property
    def dst_cluster_id(self) -> int:
        """Cluster id of the peer."""
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, value: int) -> None:
        self._dst_cluster_id = check_uint64("dst_cluster_id", value)

    @property
    def dst_addrs(self) -> list[int] | tuple[int, ...]:
        """The peer's addresses: the very object given."""
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, value: list[int] | tuple[int, ...]) -> None:
        self._dst_addrs = check_addresses("dst_addrs", value)

    @property
    def src_layer_range(self) -> range | None:
        """Layers of the source to send, None for all."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        self._src_layer_range = check_layer_range("src_layer_range", value, allow_none=True)

    @property
    def src_batch_index(self) -> int:
        """Row of the source."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", value)

    def __repr__(self) -> str:
        return (
            f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, dst_addrs={self._dst_addrs}, "
            f"src_layer_range={self._src_layer_range}, src_batch_index={self._src_batch_index})"
        )


class TransferWithCacheKeyConfig:
    """One target of a transfer, by key (reference API, 7.4).

    Args:
        cache_key: BlocksCacheKey or CacheKeyByIdAndIndex of the target.
        src_layer_range: layers of the source to send; required.
        dst_layer_range: layers of the target to fill, as many; required.
        src_batch_index: row of the source, uint32; 0 with a BlocksCacheKey.

    The four may be set later. As in the reference the setters look at one value at a time: they do
    not compare lengths, take None for key and ranges, and leave `dst_cluster_id` as it was.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an int outside its width.
        LLMParamError: bad ranges, ranges of different length, or a row with a BlocksCacheKey.
    """

    def __init__(
        self,
        cache_key: BlocksCacheKey | CacheKeyByIdAndIndex,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        key_classes = (BlocksCacheKey, CacheKeyByIdAndIndex)
        check_isinstance("cache_key", cache_key, key_classes, allow_none=False)
        source = check_layer_range("src_layer_range", src_layer_range)
        target = check_layer_range("dst_layer_range", dst_layer_range)
        if layer_count(source) != layer_count(target):
            raise param_error(
                f"src_layer_range={shown(source)} and dst_layer_range={shown(target)} "
                "differ in length."
            )
        src_batch_index = check_uint32("src_batch_index", src_batch_index)
        if src_batch_index != 0 and isinstance(cache_key, BlocksCacheKey):
            raise param_error(f"src_batch_index={src_batch_index} must be 0 with a BlocksCacheKey.")
        self._cache_key: BlocksCacheKey | CacheKeyByIdAndIndex | None = cache_key
        self._src_layer_range: range | None = source
        self._dst_layer_range: range | None = target
        self._src_batch_index = src_batch_index
        self.dst_cluster_id = cache_key.cluster_id

    @property
    def cache_key(self) -> BlocksCacheKey | CacheKeyByIdAndIndex | None:
        """Key of the target."""
        return self._cache_key

    @cache_key.setter
    def cache_key(self, value: BlocksCacheKey | CacheKeyByIdAndIndex | None) -> None:
        self._cache_key = check_isinstance(
            "cache_key", value, (BlocksCacheKey, CacheKeyByIdAndIndex)
        )

    @property
    def src_layer_range(self) -> range | None:
        """Layers of the source to send."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        self._src_layer_range = check_layer_range("src_layer_range", value, allow_none=True)

    @property
    def dst_layer_range(self) -> range | None:
        """Layers of the target to fill."""
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, value: range | None) -> None:
        self._dst_layer_range = check_layer_range("dst_layer_range", value, allow_none=True)

    @property
    def src_batch_index(self) -> int:
        """Row of the source."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", value)

    def __repr__(self) -> str:
        return (
            f"TransferWithCacheKeyConfig(cache_key={self._cache_key}, "
            f"src_layer_range={self._src_layer_range}, dst_layer_range={self._dst_layer_range}, "
            f"src_batch_index={self._src_batch_index})"
        )

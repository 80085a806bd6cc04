# SPDX-License-Identifier: Apache-2.0
"""Keys of the front door: values that name a cache, or a row of one, at whichever peer is asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

from llm_datadist_torch.values.checks import (
    check_isinstance,
    check_uint32,
    check_uint64,
    param_error,
)
from llm_datadist_torch.values.keys import (
    INVALID_ID,
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    is_invalid_id,
)

_TEXT_BIT = 1 << 63


def name_to_id(name: str | int) -> int:
    """Return the ``model_id`` that a name stands for.

    A number is its own id. A text becomes 63 bits of its BLAKE2b hash with the highest bit set, so
    that texts don't meet the small numbers that programs choose themselves.

    Raises:
        TypeError: Neither text nor int.
        ValueError: A number outside uint64.
        LLMParamError: An empty text.
    """
    check_isinstance("name", name, (str, int), allow_none=False)
    if isinstance(name, int):
        return check_uint64("name", name)
    if not name:
        raise param_error("name is an empty text", remedy="give the cache a name, or None.")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | _TEXT_BIT


@dataclass(frozen=True)
class BlocksKey:
    """Names a blocks cache. Where a method takes a key, its name alone does as well.

    Attributes:
        name: What was given to ``Node.allocate`` or ``Node.register``; or a number, which is the
            ``model_id`` of a ``BlocksCacheKey``.

    Raises:
        TypeError: ``name`` is neither text nor int.
        ValueError: A number outside uint64.
        LLMParamError: An empty text.
    """

    name: str | int = 0

    def __post_init__(self) -> None:
        name_to_id(self.name)

    def at(self, cluster_id: int) -> BlocksCacheKey:
        """Return the key of the reference API for this cache of one cluster."""
        return BlocksCacheKey(cluster_id, name_to_id(self.name))


@dataclass(frozen=True)
class RequestKey:
    """Names a row of a contiguous cache by the request that it belongs to.

    Attributes:
        request: Request id, uint64 below 2**64-1.
        name: Which model's, as for :class:`BlocksKey`.

    Raises:
        TypeError: Wrong types.
        ValueError: An id outside its width.
        LLMParamError: 2**64-1, which stands for "no request"; or an empty name.
    """

    request: int
    name: str | int = 0

    def __post_init__(self) -> None:
        _check_id("request", self.request)
        name_to_id(self.name)

    def at(self, cluster_id: int) -> CacheKey:
        """Return the key of the reference API for this row at one cluster."""
        return CacheKey(cluster_id, self.request, name_to_id(self.name))


@dataclass(frozen=True)
class PrefixKey:
    """Names a row of a contiguous cache by the prefix that it holds; pulling does not consume it.

    Attributes:
        prefix: Prefix id, uint64 below 2**64-1.
        name: Which model's, as for :class:`BlocksKey`.

    Raises:
        TypeError: Wrong types.
        ValueError: An id outside its width.
        LLMParamError: 2**64-1, which stands for "no prefix"; or an empty name.
    """

    prefix: int
    name: str | int = 0

    def __post_init__(self) -> None:
        _check_id("prefix", self.prefix)
        name_to_id(self.name)

    def at(self, cluster_id: int) -> CacheKey:
        """Return the key of the reference API for this row at one cluster."""
        return CacheKey(cluster_id, INVALID_ID, name_to_id(self.name), self.prefix)


@dataclass(frozen=True)
class RowKey:
    """Names a row of a contiguous cache by the id of the cache, which its owner has to tell.

    Attributes:
        cache_id: ``Cache.cache_id`` at its owner.
        row: Index of the row.

    Raises:
        TypeError: Wrong types.
        ValueError: An int outside its width.
        LLMParamError: ``cache_id`` is below 1.
    """

    cache_id: int
    row: int = 0

    def __post_init__(self) -> None:
        if check_uint64("cache_id", self.cache_id) < 1:
            raise param_error("cache_id=0 names no cache; ids start at 1")
        check_uint32("row", self.row)

    def at(self, cluster_id: int) -> CacheKeyByIdAndIndex:
        """Return the key of the reference API for this row at one cluster."""
        return CacheKeyByIdAndIndex(cluster_id, self.cache_id, self.row)


Key: TypeAlias = BlocksKey | RequestKey | PrefixKey | RowKey
KeyLike: TypeAlias = Key | str | int


def as_key(key: KeyLike) -> Key:
    """Return a key; a text or a number is the name of a blocks cache.

    Raises:
        TypeError: Something else.
    """
    if isinstance(key, (str, int)):
        return BlocksKey(key)
    check_isinstance("key", key, (BlocksKey, RequestKey, PrefixKey, RowKey), allow_none=False)
    return key


def _check_id(name: str, value: int) -> None:
    if is_invalid_id(check_uint64(name, value)):
        raise param_error(f"{name}={value} stands for none in this API", remedy="use another id.")

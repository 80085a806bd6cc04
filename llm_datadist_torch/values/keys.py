# SPDX-License-Identifier: Apache-2.0
"""The keys by which a peer names a row or a cache."""

from __future__ import annotations

import inspect
from typing import Any, overload

from llm_datadist_torch.values.checks import (
    check_int64,
    check_isinstance,
    check_uint32,
    check_uint64,
    param_error,
)

INVALID_ID = 2**64 - 1


def is_valid_id(value: int) -> bool:
    """Returns whether an id names something: 2^64-1 stands for "none"."""
    return value != INVALID_ID


def is_invalid_id(value: int) -> bool:
    """Returns whether an id is 2^64-1, which stands for "none"."""
    return value == INVALID_ID


def _bind(
    class_name: str,
    names: tuple[str, ...],
    required: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Gives each argument its name, by the reference's own rules (7.2).

    A positional argument silently beats a keyword, and cluster_id beats prompt_cluster_id.
    """
    given = len(args) + len(kwargs)
    if given > len(names):
        raise param_error(f"{class_name} takes at most {len(names)} arguments, but got {given}.")
    bound = {name: value for name, value in kwargs.items() if name in names}
    if "prompt_cluster_id" in kwargs:
        bound.setdefault("cluster_id", kwargs["prompt_cluster_id"])
    bound.update(zip(names, args, strict=False))
    for name in names[:required]:
        if name not in bound:
            raise param_error(f"{name} is required for {class_name}.")
    unknown = [name for name in kwargs if name not in names and name != "prompt_cluster_id"]
    if unknown:
        raise param_error(
            f"Unsupported keyword {unknown[0]!r} for {class_name}.",
            remedy=f"use {', '.join(names)} or prompt_cluster_id",
        )
    return bound


class CacheKey:
    """Names one row of a contiguous cache by request id or by prefix id (reference API, 7.2).

    Positional order: cluster_id, req_id, model_id=0, prefix_id=2^64-1; `prompt_cluster_id` is
    another keyword for cluster_id. All are uint64. A key with a prefix id is a prefix key; one with
    neither id is a placeholder, which skips a row.

    Raises:
        LLMParamError: too many, missing or unknown arguments.
        TypeError: an id is not an int.
        ValueError: an id is outside uint64.
    """

    @overload
    def __init__(
        self, cluster_id: int, req_id: int, model_id: int = 0, prefix_id: int = INVALID_ID
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        prompt_cluster_id: int,
        req_id: int,
        model_id: int = 0,
        prefix_id: int = INVALID_ID,
    ) -> None: ...

    def __init__(self, *args: int, **kwargs: int) -> None:
        names = ("cluster_id", "req_id", "model_id", "prefix_id")
        bound = _bind("CacheKey", names, 2, args, kwargs)
        self._cluster_id = check_uint64("cluster_id", bound["cluster_id"])
        self._req_id = check_uint64("req_id", bound["req_id"])
        self._model_id = check_uint64("model_id", bound.get("model_id", 0))
        self._prefix_id = check_uint64("prefix_id", bound.get("prefix_id", INVALID_ID))

    @property
    def cluster_id(self) -> int:
        """Cluster id of the peer that owns the cache; local calls ignore it."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """The same as `cluster_id`."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """Request id, `INVALID_ID` if none."""
        return self._req_id

    @property
    def model_id(self) -> int:
        """Model id."""
        return self._model_id

    @property
    def prefix_id(self) -> int:
        """Prefix id, `INVALID_ID` if none."""
        return self._prefix_id

    @property
    def is_prefix(self) -> bool:
        """Whether this is a prefix key: a prefix id wins over a request id (8.5)."""
        return is_valid_id(self._prefix_id)

    @property
    def is_placeholder(self) -> bool:
        """Whether this key names nothing, and only skips its row (8.5)."""
        return is_invalid_id(self._req_id) and is_invalid_id(self._prefix_id)

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
            f"prefix_id={self._prefix_id}, model_id={self._model_id})"
        )


class BlocksCacheKey:
    """Names a blocks cache (reference API, 7.2).

    Positional order: cluster_id, model_id=0; `prompt_cluster_id` is another keyword for cluster_id.

    Raises:
        LLMParamError: too many, missing or unknown arguments.
        TypeError: an id is not an int.
        ValueError: an id is outside uint64.
    """

    @overload
    def __init__(self, cluster_id: int, model_id: int = 0) -> None: ...

    @overload
    def __init__(self, *, prompt_cluster_id: int, model_id: int = 0) -> None: ...

    def __init__(self, *args: int, **kwargs: int) -> None:
        bound = _bind("BlocksCacheKey", ("cluster_id", "model_id"), 1, args, kwargs)
        bound.setdefault("model_id", 0)
        for name in ("cluster_id", "model_id"):
            check_isinstance(name, bound[name], int, allow_none=False)
        self._cluster_id = check_uint64("cluster_id", bound["cluster_id"])
        self._model_id = check_uint64("model_id", bound["model_id"])
        by_prompt_id = not args and "cluster_id" not in kwargs
        self._id_name = "prompt_cluster_id" if by_prompt_id else "cluster_id"

    @property
    def cluster_id(self) -> int:
        """Cluster id of the peer that owns the cache; local calls ignore it."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """The same as `cluster_id`."""
        return self._cluster_id

    @property
    def model_id(self) -> int:
        """Model id."""
        return self._model_id

    def __repr__(self) -> str:
        return f"BlocksCacheKey({self._id_name}={self._cluster_id}, model_id={self._model_id})"


class CacheKeyByIdAndIndex:
    """Names a row by the id of its cache and the row's index (reference API, 7.2).

    Args:
        cluster_id: cluster id of the peer that owns the cache, uint64.
        cache_id: id of the cache, int64; a negative one names no cache, and is refused where used.
        batch_index: index of the row, uint32.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its width.
    """

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cache_id = check_int64("cache_id", cache_id)
        self._batch_index = check_uint32("batch_index", batch_index)

    @property
    def cluster_id(self) -> int:
        """Cluster id of the peer that owns the cache."""
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        """Id of the cache."""
        return self._cache_id

    @property
    def batch_index(self) -> int:
        """Index of the row."""
        return self._batch_index

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )


def _show_parameters(key_class: type, names: dict[str, object]) -> None:
    """Give ``help()`` and completion the parameters that ``*args, **kwargs`` hide."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = [inspect.Parameter(n, kind, default=d, annotation=int) for n, d in names.items()]
    key_class.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]


_REQUIRED = inspect.Parameter.empty
_show_parameters(BlocksCacheKey, {"cluster_id": _REQUIRED, "model_id": 0})
_show_parameters(
    CacheKey,
    {"cluster_id": _REQUIRED, "req_id": _REQUIRED, "model_id": 0, "prefix_id": INVALID_ID},
)


def check_cache_key(key: CacheKey, name: str = "cache_key") -> CacheKey:
    """Returns a key if exactly one of its request id and prefix id is valid (9.3, step 8).

    Raises:
        LLMParamError: both are, or neither is.
    """
    if is_valid_id(key.req_id) == is_valid_id(key.prefix_id):
        which = "both are" if is_valid_id(key.req_id) else "neither is"
        raise param_error(
            f"{name}: exactly one of req_id and prefix_id must be valid, {which} in {key}.",
            remedy=f"set the other one to {INVALID_ID}",
        )
    return key

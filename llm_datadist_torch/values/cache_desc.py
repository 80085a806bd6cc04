# SPDX-License-Identifier: Apache-2.0
"""CacheDesc: how many tensors a cache has, of which shape and element type, and where."""

from __future__ import annotations

import math

import torch

from llm_datadist_torch.values.checks import (
    INT64_MAX,
    check_int32,
    check_int64,
    check_isinstance,
    check_uint32,
    param_error,
    shown,
)
from llm_datadist_torch.values.data_type import DataType, from_torch_dtype, to_torch_dtype
from llm_datadist_torch.values.enums import Placement


class CacheDesc:
    """Describes a cache of `num_tensors` equal tensors (reference API, 7.1).

    Args:
        num_tensors: number of tensors, uint32.
        shape: list or tuple of int64, kept as it is (not copied); dimension 0 counts rows or
            blocks.
        data_type: element type; a torch.dtype is taken too, and stored as its DataType.
        placement: where the tensors lie.
        batch_dim_index: which dimension counts the batch.
        seq_len_dim_index: which dimension counts the sequence, -1 if none.
        kv_tensor_format: a note for the user, never read here.

    None passes for `data_type` and `placement`, as in the reference; what needs them then raises
    TypeError.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an int outside its C width.
        LLMParamError: an index that names no dimension, or a torch dtype without DataType.
    """

    def __init__(
        self,
        num_tensors: int,
        shape: list[int] | tuple[int, ...],
        data_type: DataType | torch.dtype,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
    ) -> None:
        self._num_tensors = check_uint32("num_tensors", num_tensors)
        shape = check_isinstance("shape", shape, (list, tuple), int, allow_none=False)
        self._shape = shape
        if isinstance(data_type, torch.dtype):
            data_type = from_torch_dtype(data_type)
        self._data_type: DataType = check_isinstance("data_type", data_type, DataType)
        self._placement = check_isinstance("placement", placement, Placement)
        batch_dim_index = check_isinstance(
            "batch_dim_index", batch_dim_index, int, allow_none=False
        )
        seq_len_dim_index = check_int32("seq_len_dim_index", seq_len_dim_index)
        self._kv_tensor_format = check_isinstance("kv_tensor_format", kv_tensor_format, str)
        if not 0 <= batch_dim_index < len(shape):
            raise param_error(
                f"batch_dim_index={shown(batch_dim_index)} names no dimension of {len(shape)}."
            )
        if seq_len_dim_index != -1 and not 0 <= seq_len_dim_index < len(shape):
            raise param_error(
                f"seq_len_dim_index={seq_len_dim_index} names no dimension of {len(shape)}.",
                remedy="give -1 if no dimension counts the sequence",
            )
        for i, dim in enumerate(shape):
            check_int64(f"shape[{i}]", dim)
        self._batch_dim_index = batch_dim_index
        self._seq_len_dim_index = seq_len_dim_index
        self._batch_size = shape[batch_dim_index]

    @property
    def num_tensors(self) -> int:
        """Number of tensors of the cache."""
        return self._num_tensors

    @property
    def shape(self) -> list[int] | tuple[int, ...]:
        """Shape of one tensor: the very object that the caller gave. See also `dims`."""
        return self._shape

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of one tensor as it is now, as a tuple of its own (not in the reference)."""
        return tuple(self._shape)

    @property
    def data_type(self) -> DataType:
        """Element type."""
        return self._data_type

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type as torch's (not in the reference).

        Raises:
            TypeError: `data_type` is None.
            LLMParamError: torch has no such type.
        """
        return to_torch_dtype(self._known_data_type())

    @property
    def placement(self) -> Placement:
        """Where the tensors lie."""
        return self._placement

    @property
    def batch_dim(self) -> int:
        """Which dimension counts the batch."""
        return self._batch_dim_index

    @property
    def batch_size(self) -> int:
        """`shape[batch_dim_index]` as it was when the description was made."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        """Which dimension counts the sequence, -1 if none."""
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        """The user's note."""
        return self._kv_tensor_format

    @property
    def numel(self) -> int:
        """Number of elements of one tensor (not in the reference).

        Raises:
            LLMParamError: a dimension is not above 0, or the product exceeds int64.
        """
        for i, dim in enumerate(self._shape):
            if dim <= 0:
                raise param_error(f"shape[{i}]={dim} must be above 0 (shape {self._shape}).")
        return _within_int64(math.prod(self._shape), "elements", self._shape)

    @property
    def size(self) -> int:
        """Bytes of one tensor, computed each time, so never older than `shape`.

        Raises:
            TypeError: `data_type` is None.
            LLMParamError: a dimension is not above 0, or the size exceeds int64.
        """
        item_bytes = self._known_data_type().itemsize
        return _within_int64(self.numel * item_bytes, "bytes", self._shape)

    def update_dim(self, i: int, v: int) -> None:
        """Sets `shape[i]`, in the caller's own list. `batch_size` stays as it was.

        Raises:
            TypeError: the shape is a tuple, or `v` is not an int.
            ValueError: `v` is outside int64.
        """
        if isinstance(self._shape, tuple):
            raise TypeError(f"shape {self._shape} is a tuple, update_dim only support list")
        self._shape[i] = check_int64(f"shape[{i}]", v)

    def _known_data_type(self) -> DataType:
        if not isinstance(self._data_type, DataType):
            raise TypeError(f"data_type only support DataType, but is {self._data_type}")
        return self._data_type

    def __repr__(self) -> str:
        # The missing blank before kv_tensor_format is the reference's.
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, "
            f"data_type={self._data_type}, placement={self._placement}, "
            f"batch_dim_index={self._batch_dim_index}, "
            f"seq_len_dim_index={self._seq_len_dim_index},"
            f"kv_tensor_format={self._kv_tensor_format})"
        )


def _within_int64(value: int, unit: str, shape: list[int] | tuple[int, ...]) -> int:
    if value > INT64_MAX:
        raise param_error(f"shape {shape} has more {unit} than int64 can count.")
    return value

# SPDX-License-Identifier: Apache-2.0
"""One table of element types: value, bytes, torch dtype, numpy type; look-ups both ways."""

from __future__ import annotations

import importlib
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from llm_datadist_torch.values.status import LLMStatusCode, error_for

if TYPE_CHECKING:
    from typing_extensions import Self


class DataType(Enum):
    """The table of element types (reference API, 2.3): value, bytes, torch name, numpy name."""

    itemsize: int
    torch_name: str | None
    numpy_name: str

    def __new__(
        cls, value: int, itemsize: int = 0, torch_name: str | None = None, numpy_name: str = ""
    ) -> Self:
        """Makes one member out of one row of the table."""
        member = object.__new__(cls)
        member._value_ = value
        member.itemsize = itemsize
        member.torch_name = torch_name
        member.numpy_name = numpy_name
        return member

    DT_FLOAT = 0, 4, "float32", "float32"
    DT_FLOAT16 = 1, 2, "float16", "float16"
    DT_BF16 = 27, 2, "bfloat16", "float16"
    DT_INT8 = 2, 1, "int8", "int8"
    DT_INT16 = 6, 2, "int16", "int16"
    DT_UINT16 = 7, 2, "uint16", "uint16"
    DT_UINT8 = 4, 1, "uint8", "uint8"
    DT_INT32 = 3, 4, "int32", "int32"
    DT_INT64 = 9, 8, "int64", "int64"
    DT_UINT32 = 8, 4, "uint32", "uint32"
    DT_UINT64 = 10, 8, "uint64", "uint64"
    DT_BOOL = 12, 1, "bool", "bool_"
    DT_DOUBLE = 11, 8, "float64", "double"
    DT_STRING = 13, 16, None, "bytes_"


def itemsize(data_type: DataType) -> int:
    """Returns the bytes of one element."""
    return data_type.itemsize


def to_torch_dtype(data_type: DataType) -> torch.dtype:
    """Returns the torch dtype of a DataType.

    Raises:
        LLMParamError: torch, or the torch installed here, has no such dtype.
    """
    name = data_type.torch_name
    dtype = getattr(torch, name, None) if name is not None else None
    if isinstance(dtype, torch.dtype):
        return dtype
    raise error_for(
        LLMStatusCode.LLM_PARAM_INVALID,
        f"{data_type} has no torch dtype in torch {torch.__version__}.",
        remedy="use a DataType of the same size that torch has",
    )


def from_torch_dtype(dtype: torch.dtype) -> DataType:
    """Returns the DataType of a torch dtype.

    Raises:
        TypeError: `dtype` is not a torch.dtype.
        LLMParamError: the dtype has no DataType (complex and float8 types, for instance).
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype only support torch.dtype, but got {type(dtype).__name__}")
    data_type = _DATA_TYPE_OF_TORCH.get(dtype)
    if data_type is None:
        raise error_for(
            LLMStatusCode.LLM_PARAM_INVALID,
            f"{dtype} has no DataType.",
            remedy="view the tensor as a type of the same size, e.g. tensor.view(torch.uint8)",
        )
    return data_type


# getattr, because older versions of torch lack the wider unsigned types.
_DATA_TYPE_OF_TORCH: dict[torch.dtype, DataType] = {
    getattr(torch, member.torch_name): member
    for member in DataType
    if member.torch_name is not None and hasattr(torch, member.torch_name)
}


def _numpy_tables() -> dict[str, Any]:
    """Builds the reference's three numpy tables; numpy is imported only when they are used."""
    numpy = importlib.import_module("numpy")
    to_numpy = {member: getattr(numpy, member.numpy_name) for member in DataType}
    return {
        "dtype_to_np_dtype": to_numpy,
        "valid_np_dtypes": list(to_numpy.values()),
        # numpy has no bfloat16: float16 stands in for it, but never leads back to it.
        "np_dtype_to_dtype": {
            numpy_type: member
            for member, numpy_type in to_numpy.items()
            if member is not DataType.DT_BF16
        },
    }


def __getattr__(name: str) -> Any:  # noqa: ANN401 (three tables of different types)
    if name in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"):
        globals().update(_numpy_tables())
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

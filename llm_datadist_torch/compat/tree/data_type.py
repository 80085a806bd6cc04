# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.data_type``; the numpy tables are made when they are first asked for."""

from __future__ import annotations

from typing import Any

from llm_datadist_torch.values import data_type
from llm_datadist_torch.values.data_type import DataType

__all__ = [
    "DataType",
    "get_python_dtype_from_wrapper_dtype",
    "python_dtype_2_dwrapper_dtype",
]

python_dtype_2_dwrapper_dtype: dict[DataType, int] = {member: member.value for member in DataType}


def get_python_dtype_from_wrapper_dtype(wrapper_dtype: int) -> DataType:
    """The DataType of an engine's number.

    Raises:
        ValueError: No such number.
    """
    return DataType(wrapper_dtype)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (three tables of different types)
    if name in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"):
        return getattr(data_type, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

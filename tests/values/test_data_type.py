# SPDX-License-Identifier: Apache-2.0
"""DataType and its way to torch and numpy and back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_datadist_torch.values import data_type as data_type_module
from llm_datadist_torch.values.data_type import (
    DataType,
    from_torch_dtype,
    itemsize,
    to_torch_dtype,
)
from llm_datadist_torch.values.status import LLMParamError

# In the iteration order of the reference API, 2.3: name, value, bytes, numpy type, torch dtype.
TABLE = [
    ("DT_FLOAT", 0, 4, np.float32, torch.float32),
    ("DT_FLOAT16", 1, 2, np.float16, torch.float16),
    ("DT_BF16", 27, 2, np.float16, torch.bfloat16),
    ("DT_INT8", 2, 1, np.int8, torch.int8),
    ("DT_INT16", 6, 2, np.int16, torch.int16),
    ("DT_UINT16", 7, 2, np.uint16, torch.uint16),
    ("DT_UINT8", 4, 1, np.uint8, torch.uint8),
    ("DT_INT32", 3, 4, np.int32, torch.int32),
    ("DT_INT64", 9, 8, np.int64, torch.int64),
    ("DT_UINT32", 8, 4, np.uint32, torch.uint32),
    ("DT_UINT64", 10, 8, np.uint64, torch.uint64),
    ("DT_BOOL", 12, 1, np.bool_, torch.bool),
    ("DT_DOUBLE", 11, 8, np.double, torch.float64),
    ("DT_STRING", 13, 16, np.bytes_, None),
]


def test_members_and_their_order():
    assert [(m.name, m.value) for m in DataType] == [row[:2] for row in TABLE]


@pytest.mark.parametrize(("name", "value", "nbytes", "numpy_type", "dtype"), TABLE)
def test_each_row(name, value, nbytes, numpy_type, dtype):
    member = DataType[name]
    assert DataType(value) is member
    assert itemsize(member) == member.itemsize == nbytes
    assert str(member) == f"{member}" == f"DataType.{name}"
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert data_type_module.dtype_to_np_dtype[member] is numpy_type
    if dtype is None:
        with pytest.raises(LLMParamError, match=name):
            to_torch_dtype(member)
    else:
        assert to_torch_dtype(member) is dtype
        assert from_torch_dtype(dtype) is member
        assert dtype.itemsize == nbytes


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.qint8])
def test_torch_dtypes_without_data_type(dtype):
    with pytest.raises(LLMParamError, match=str(dtype)):
        from_torch_dtype(dtype)


@pytest.mark.parametrize("value", [None, "float32", np.float32, DataType.DT_FLOAT])
def test_what_is_no_torch_dtype(value):
    with pytest.raises(TypeError, match="only support"):
        from_torch_dtype(value)


def test_an_older_torch_without_the_type(monkeypatch):
    monkeypatch.delattr(torch, "uint16")
    with pytest.raises(LLMParamError, match="DT_UINT16"):
        to_torch_dtype(DataType.DT_UINT16)


def test_numpy_tables():
    assert len(data_type_module.dtype_to_np_dtype) == 14
    assert len(data_type_module.valid_np_dtypes) == 14
    back = data_type_module.np_dtype_to_dtype
    assert len(back) == 13
    assert DataType.DT_BF16 not in back.values()
    assert back[np.float16] is DataType.DT_FLOAT16
    with pytest.raises(AttributeError, match="has no attribute"):
        data_type_module.dtype_to_nothing  # noqa: B018


def test_works_without_numpy_and_without_the_wide_unsigned_types():
    code = (
        "import sys, torch; sys.modules['numpy'] = None\n"
        "del torch.uint16, torch.uint32, torch.uint64\n"
        "from llm_datadist_torch.values import data_type as d\n"
        "assert d.from_torch_dtype(torch.bfloat16) is d.DataType.DT_BF16\n"
        "try: d.valid_np_dtypes\n"
        "except ImportError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "refused", done.stderr

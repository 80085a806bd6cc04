# SPDX-License-Identifier: Apache-2.0
"""CacheDesc: checks and their order, properties, size, repr."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.data_type import DataType
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.status import LLMException, LLMParamError, LLMStatusCode

FP16 = DataType.DT_FLOAT16


def test_the_conformance_vector():
    desc = CacheDesc(4, [2, 8], FP16)
    assert (desc.size, desc.batch_size, desc.size // desc.batch_size) == (32, 2, 16)
    assert desc.placement is Placement.DEVICE
    assert (desc.num_tensors, desc.batch_dim, desc.seq_len_dim_index) == (4, 0, -1)
    assert desc.kv_tensor_format is None
    assert (
        repr(desc)
        == str(desc)
        == (
            "CacheDesc(num_tensors=4, shape=[2, 8], data_type=DataType.DT_FLOAT16, "
            "placement=Placement.DEVICE, batch_dim_index=0, seq_len_dim_index=-1,"
            "kv_tensor_format=None)"
        )
    )


def test_repr_of_everything_given():
    desc = CacheDesc(1, (3, 5), DataType.DT_BF16, Placement.HOST, 1, 0, "BSND")
    assert repr(desc) == (
        "CacheDesc(num_tensors=1, shape=(3, 5), data_type=DataType.DT_BF16, "
        "placement=Placement.HOST, batch_dim_index=1, seq_len_dim_index=0,kv_tensor_format=BSND)"
    )
    assert desc.batch_size == 5


PI = LLMParamError


@pytest.mark.parametrize(
    ("arguments", "expected", "text"),
    [
        ({"num_tensors": "4"}, TypeError, "num_tensors"),
        ({"num_tensors": None}, TypeError, "num_tensors"),
        ({"num_tensors": -1}, ValueError, "num_tensors"),
        ({"num_tensors": 2**32}, ValueError, "num_tensors"),
        ({"shape": None}, TypeError, "shape"),
        ({"shape": "28"}, TypeError, "shape"),
        ({"shape": [2, 8.0]}, TypeError, r"shape\[1\]"),
        ({"data_type": 1}, TypeError, "data_type"),
        ({"data_type": "float16"}, TypeError, "data_type"),
        ({"data_type": torch.complex64}, PI, "complex64"),
        ({"placement": 1}, TypeError, "placement"),
        ({"batch_dim_index": None}, TypeError, "batch_dim_index"),
        ({"batch_dim_index": "0"}, TypeError, "batch_dim_index"),
        ({"seq_len_dim_index": None}, TypeError, "seq_len_dim_index"),
        ({"seq_len_dim_index": 2**31}, ValueError, "seq_len_dim_index"),
        ({"kv_tensor_format": 1}, TypeError, "kv_tensor_format"),
        ({"batch_dim_index": 2}, PI, "batch_dim_index=2"),
        ({"batch_dim_index": -1}, PI, "batch_dim_index=-1"),
        pytest.param({"batch_dim_index": 10**5000}, PI, "batch_dim_index", id="long"),
        ({"shape": []}, PI, "batch_dim_index=0"),
        ({"seq_len_dim_index": 2}, PI, "seq_len_dim_index=2"),
        ({"seq_len_dim_index": -2}, PI, "seq_len_dim_index=-2"),
        ({"shape": [2, 2**63]}, ValueError, r"shape\[1\]"),
        ({"shape": [2, -(2**63) - 1]}, ValueError, r"shape\[1\]"),
    ],
)
def test_bad_arguments(arguments, expected, text):
    with pytest.raises(expected, match=text) as caught:
        CacheDesc(**{"num_tensors": 4, "shape": [2, 8], "data_type": FP16, **arguments})
    assert isinstance(caught.value, LLMException) == (expected is PI)
    if expected is PI:
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


# Each step is wrong together with every step after it: the earliest must be what is raised.
STEPS = [
    ("num_tensors", -1, ValueError, "num_tensors"),
    ("shape", "x", TypeError, "shape only"),
    ("data_type", 1, TypeError, "data_type"),
    ("placement", 1, TypeError, "placement"),
    ("batch_dim_index", "0", TypeError, "batch_dim_index"),
    ("seq_len_dim_index", 2**31, ValueError, "seq_len_dim_index"),
    ("kv_tensor_format", 1, TypeError, "kv_tensor_format"),
    ("batch_dim_index", 9, PI, "batch_dim_index=9"),
    ("seq_len_dim_index", 9, PI, "seq_len_dim_index=9"),
    ("shape", [2, 2**63], ValueError, r"shape\[1\]"),
]


@pytest.mark.parametrize("first", range(len(STEPS)))
def test_order_of_checks(first):
    arguments = {"num_tensors": 1, "shape": [2, 2], "data_type": FP16}
    for name, value, _, _ in reversed(STEPS[first:]):
        arguments[name] = value
    with pytest.raises(STEPS[first][2], match=STEPS[first][3]):
        CacheDesc(**arguments)


def test_none_passes_where_the_reference_lets_it_and_fails_when_used():
    desc = CacheDesc(1, [2], None, None, kv_tensor_format=None)
    assert desc.data_type is None
    assert desc.placement is None
    for name in ("size", "torch_dtype"):
        with pytest.raises(TypeError, match="data_type"):
            getattr(desc, name)


def test_no_tensors_is_a_description():
    assert CacheDesc(0, [2], FP16).num_tensors == 0


@pytest.mark.parametrize("data_type", list(DataType))
def test_a_torch_dtype_is_stored_as_data_type(data_type):
    if data_type is DataType.DT_STRING:
        desc = CacheDesc(1, [2], data_type)
        assert desc.size == 32
        with pytest.raises(LLMParamError, match="DT_STRING"):
            desc.torch_dtype  # noqa: B018
        return
    dtype = CacheDesc(1, [2], data_type).torch_dtype
    desc = CacheDesc(1, [2], dtype)
    assert desc.data_type is data_type
    assert desc.torch_dtype is dtype
    assert desc.size == 2 * dtype.itemsize


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.sampled_from(list(DataType)))
def test_size_and_numel(shape, data_type):
    desc = CacheDesc(1, shape, data_type)
    numel = torch.Size(shape).numel()
    assert desc.numel == numel
    assert desc.size == numel * data_type.itemsize
    assert desc.dims == tuple(shape)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([2, 0], r"shape\[1\]=0"),
        ([-1, 2], r"shape\[0\]=-1"),
        ([2**62, 2], "int64"),
        ([2**62], "bytes than int64"),
        ([2**62] * 300, "int64"),
    ],
)
def test_impossible_sizes(shape, text):
    desc = CacheDesc(1, shape, FP16)
    with pytest.raises(LLMParamError, match=text) as caught:
        desc.size  # noqa: B018
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_shape_is_the_callers_own_object():
    shape = [2, 8]
    desc = CacheDesc(1, shape, FP16)
    dims = desc.dims
    assert desc.shape is shape
    shape[0] = 5
    assert desc.size == 80
    assert (dims, desc.dims) == ((2, 8), (5, 8))
    assert desc.batch_size == 2


def test_update_dim():
    shape = [2, 8]
    desc = CacheDesc(1, shape, FP16)
    assert desc.size == 32
    desc.update_dim(0, 4)
    assert (shape, desc.size, desc.batch_size) == ([4, 8], 64, 2)
    with pytest.raises(TypeError, match="only support int"):
        desc.update_dim(0, "4")
    with pytest.raises(ValueError, match="out of range"):
        desc.update_dim(0, 2**63)
    with pytest.raises(IndexError):
        desc.update_dim(2, 1)
    assert shape == [4, 8]
    for fixed in ((2, 8), torch.Size([2, 8])):
        with pytest.raises(TypeError, match="tuple"):
            CacheDesc(1, fixed, FP16).update_dim(0, 4)


@pytest.mark.parametrize(
    "name",
    [
        "num_tensors",
        "shape",
        "dims",
        "data_type",
        "torch_dtype",
        "placement",
        "batch_dim",
        "batch_size",
        "seq_len_dim_index",
        "kv_tensor_format",
        "numel",
        "size",
    ],
)
def test_properties_are_read_only(name):
    with pytest.raises(AttributeError):
        setattr(CacheDesc(1, [2], FP16), name, 1)


def test_identity_pickle_and_no_hidden_kind():
    desc = CacheDesc(1, [2], FP16)
    assert desc != CacheDesc(1, [2], FP16)
    assert repr(pickle.loads(pickle.dumps(desc))) == repr(copy.deepcopy(desc)) == repr(desc)
    assert not hasattr(desc, "_is_blocks")

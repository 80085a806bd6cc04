# SPDX-License-Identifier: Apache-2.0
"""create_npu_tensors: the very memory of a cache, as torchair's function gives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llm_datadist_torch import CacheDesc, DataType, LLMParamError, Placement
from llm_datadist_torch.compat import create_npu_tensors

DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)


def test_writes_go_to_the_cache(instance_factory: Any):
    cache = instance_factory().cache_manager.allocate_cache(DESC)
    made = create_npu_tensors([4, 8], torch.float16, cache.tensor_addrs, device="cpu")
    for i, (tensor, own) in enumerate(zip(made, cache.tensors, strict=True)):
        tensor.fill_(i + 1)
        assert torch.equal(own, torch.full((4, 8), i + 1, dtype=torch.float16))
        assert (tensor.shape, tensor.dtype) == (own.shape, own.dtype)
        assert tensor.data_ptr() == own.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype", "addresses", "error"),
    [
        ("4", torch.float16, [], TypeError),
        ([4, 8.0], torch.float16, [], TypeError),
        ([4, 8], DataType.DT_FLOAT16, [], TypeError),
        ([4, 8], torch.float16, [True], TypeError),
        ([4, 8], torch.float16, None, TypeError),
        ([4, 8], torch.float16, [-1], ValueError),
        ([4, 8], torch.float16, [0], LLMParamError),
        ([4, 8], torch.float16, [64], LLMParamError),
        ([0, 8], torch.float16, [64], LLMParamError),
    ],
)
def test_refuses(shape: Any, dtype: Any, addresses: Any, error: type[Exception]):
    with pytest.raises(error) as caught:
        create_npu_tensors(shape, dtype, addresses, device="cpu")
    assert isinstance(caught.value, LLMParamError) == (error is LLMParamError)


def test_numpy_addresses():
    owner = torch.arange(8)
    address = np.uint64(owner.data_ptr())
    (made,) = create_npu_tensors((np.int64(8),), torch.int64, [address], device="cpu")
    assert torch.equal(made, owner)

# SPDX-License-Identifier: Apache-2.0
"""What the checks of kernels for serving engines share. It runs under the simulator."""

from __future__ import annotations

import ctypes
import random
from typing import ClassVar

import torch

DEVICE = "npu:0"
HALF = (torch.float16, torch.bfloat16)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """They are equal within the rounding of their type."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(actual.dtype, 0)
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def generator(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


class Opapi:
    """Kernels that no operator of torch_npu calls, only extensions do."""

    _TYPES: ClassVar = {
        torch.float32: 0,
        torch.float16: 1,
        torch.bfloat16: 27,
        torch.int32: 3,
        torch.int64: 9,
    }

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libopapi.so")
        self._library.aclCreateTensor.restype = ctypes.c_void_p
        self._library.aclCreateIntArray.restype = ctypes.c_void_p

    def tensor(self, tensor: torch.Tensor) -> ctypes.c_void_p:
        count = tensor.dim()
        sizes, strides = ((ctypes.c_int64 * count)(*of) for of in (tensor.shape, tensor.stride()))
        dims, nd = ctypes.c_uint64(count), 2
        made = self._library.aclCreateTensor(
            sizes,
            dims,
            self._TYPES[tensor.dtype],
            strides,
            ctypes.c_int64(0),
            nd,
            sizes,
            dims,
            ctypes.c_void_p(tensor.data_ptr()),
        )
        return ctypes.c_void_p(made)

    def ints(self, *values: int) -> ctypes.c_void_p:
        array = (ctypes.c_int64 * len(values))(*values)
        return ctypes.c_void_p(self._library.aclCreateIntArray(array, ctypes.c_uint64(len(values))))

    def launch(self, name: str, *arguments: object) -> None:
        executor, size = ctypes.c_void_p(), ctypes.c_uint64()
        prepare, run = (getattr(self._library, name + end) for end in ("GetWorkspaceSize", ""))
        assert prepare(*arguments, ctypes.byref(size), ctypes.byref(executor)) == 0
        stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
        assert run(None, size, executor, stream) == 0

# SPDX-License-Identifier: Apache-2.0
"""What the checks of kernels for serving engines share. It runs under the simulator."""

from __future__ import annotations

import random

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

# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2.llm_utils``: the helpers that programs use."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_datadist_torch.values.checks import UINT64_MAX, check_layer_range, check_uint32
from llm_datadist_torch.values.config import parse_listen_ip_info
from llm_datadist_torch.values.data_type import DataType, itemsize

__all__ = [
    "calc_tensor_size",
    "is_invalid_id",
    "is_valid_id",
    "layer_range_to_tensor_indices",
    "parse_listen_ip_info",
]


def calc_tensor_size(shape: Sequence[int], data_type: DataType) -> int:
    """Bytes of one tensor."""
    return math.prod(shape) * itemsize(data_type)


def layer_range_to_tensor_indices(layer_range: range, tensor_num_per_layer: int = 2) -> list[int]:
    """Indices of the tensors of some layers.

    Raises:
        TypeError: Not a range.
        LLMParamError: A range that is empty, negative or has a step.
        ValueError: A bound outside uint32.
    """
    tensor_num_per_layer = check_uint32("tensor_num_per_layer", tensor_num_per_layer)
    layers = check_layer_range("layer_range", layer_range, uint32_bounds=True)
    return list(range(layers.start * tensor_num_per_layer, layers.stop * tensor_num_per_layer))


def is_valid_id(identifier: int) -> bool:
    """Whether a request or prefix id names one: 2**64-1 stands for none."""
    return identifier != UINT64_MAX


def is_invalid_id(identifier: int) -> bool:
    """Whether a request or prefix id stands for none."""
    return identifier == UINT64_MAX

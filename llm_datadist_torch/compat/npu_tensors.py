# SPDX-License-Identifier: Apache-2.0
"""The equal of ``torchair.llm_datadist.create_npu_tensors``: tensors over a cache's addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_datadist_torch.memory.address import tensors_over
from llm_datadist_torch.memory.device import choose_device
from llm_datadist_torch.values.checks import check_addresses, check_isinstance


def create_npu_tensors(
    shape: Sequence[int],
    dtype: torch.dtype,
    addresses: list[int] | tuple[int, ...],
    *,
    device: torch.device | str | None = None,
) -> list[torch.Tensor]:
    """Makes tensors over ``cache.tensor_addrs``. Copies nothing.

    ``cache.tensors`` gives the same and keeps the memory alive, which nothing does here: end the
    cache after the last use of these.

    Args:
        shape: Shape of each tensor.
        dtype: Their element type.
        addresses: One per tensor.
        device: Where the memory is (not in torchair); None for the current NPU, or for the CPU
            where there is none.

    Raises:
        TypeError: An argument of a wrong type; a bool is not an address.
        ValueError: An address outside uint64.
        LLMParamError: An address that isn't memory of the device over the whole tensor.
    """
    shape = check_isinstance("shape", shape, (list, tuple), int, allow_none=False)
    check_isinstance("dtype", dtype, torch.dtype, allow_none=False)
    addresses = check_addresses("addresses", addresses)
    where = _current_device() if device is None else torch.device(device)
    return tensors_over(addresses, shape, dtype, where)


def _current_device() -> torch.device:
    device = choose_device("auto", 0).device
    if device.index is None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())

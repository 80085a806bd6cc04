# SPDX-License-Identifier: Apache-2.0
"""The device that the tests run on, and what a program has to do about it."""

from __future__ import annotations

import functools

import torch

from llm_datadist_torch import Placement
from llm_datadist_torch.memory.address import HOST, tensor_over
from llm_datadist_torch.memory.device import why_no_npu
from llm_datadist_torch.values.environment import npu_is_simulated


@functools.cache
def default_device() -> torch.device:
    """What ``Placement.DEVICE`` is to an instance that says nothing of devices."""
    return HOST if why_no_npu()[0] else torch.device("npu", 0)


def on_npu() -> bool:
    return default_device() != HOST


def device_of(placement: Placement) -> torch.device:
    """Where memory of this placement has to be."""
    return HOST if placement is Placement.HOST else default_device()


def examples(number: int) -> int:
    """How many examples a property is tried with; each operation takes the simulator a while."""
    return max(1, number // 5) if npu_is_simulated() else number


def finish_kernels() -> None:
    """Wait for what was started on the device. Peers know of no stream of ours."""
    if on_npu():
        torch.npu.synchronize()  # type: ignore[attr-defined]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory as it is, whatever lies in it: tensors, and what is between them."""
    return tensor_over(address, (nbytes,), torch.uint8, device)


def overwrite(memory: torch.Tensor, data: bytes) -> None:
    """Put bytes into memory; they are there when this returns."""
    memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    finish_kernels()

# SPDX-License-Identifier: Apache-2.0
"""Gather and scatter of bytes by address, for relayed transfers.

Callers have checked the addresses.
"""

from __future__ import annotations

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies, streams

_HOST = torch.device(streams.HOST)
_BASE = torch.zeros(1, dtype=torch.int64)


def gather(addrs: torch.Tensor, sizes: torch.Tensor, device: torch.device = _HOST) -> memoryview:
    """The bytes of all spans, one after the other. Blocks until they have come from a device.

    They are copied once, into memory that is the caller's.

    Args:
        addrs: Start of each span in this process, int64 [n].
        sizes: Its bytes, int64 [n].
        device: Where the spans are.
    """
    staging = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    _copy(staging.data_ptr() + sizes.cumsum(0) - sizes, _HOST, addrs, device, sizes)
    return staging.numpy().data


def scatter(
    addrs: torch.Tensor,
    sizes: torch.Tensor,
    data: bytes | bytearray | memoryview,
    device: torch.device = _HOST,
) -> None:
    """Write ``data`` over all spans, one after the other. Blocks until it is there.

    Args:
        addrs: Start of each span in this process, int64 [n].
        sizes: Its bytes, int64 [n]; their sum is ``len(data)``, which is not 0.
        data: The bytes.
        device: Where the spans are.
    """
    staging = torch.frombuffer(_writable(data), dtype=torch.uint8)
    _copy(addrs, device, staging.data_ptr() + sizes.cumsum(0) - sizes, _HOST, sizes)


def _writable(data: bytes | bytearray | memoryview) -> bytearray | memoryview:
    """The data; a copy where torch would warn that it can't be written to."""
    return bytearray(data) if isinstance(data, bytes) else data


def _copy(
    dst: torch.Tensor,
    dst_device: torch.device,
    src: torch.Tensor,
    src_device: torch.device,
    sizes: torch.Tensor,
) -> None:
    runs = torch.stack([dst, src, sizes], dim=1).contiguous()
    device = streams.device_of((dst_device, src_device))
    if device == _HOST:
        _C.copy_runs(_BASE, _BASE, runs)
    else:
        with streams.own_stream(device):
            device_copies.copy_runs(_BASE, _BASE, runs, dst_device, src_device)

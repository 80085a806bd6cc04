# SPDX-License-Identifier: Apache-2.0
"""Gather and scatter of bytes by address, for relayed transfers.

Callers have checked the addresses.
"""

from __future__ import annotations

import torch

from llm_datadist_torch import _C

_BASE = torch.zeros(1, dtype=torch.int64)


def gather(addrs: torch.Tensor, sizes: torch.Tensor) -> bytes:
    """The bytes of all spans, one after the other.

    Args:
        addrs: Start of each span in this process, int64 [n].
        sizes: Its bytes, int64 [n].
    """
    staging = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    _copy(staging.data_ptr() + sizes.cumsum(0) - sizes, addrs, sizes)
    return staging.numpy().tobytes()


def scatter(addrs: torch.Tensor, sizes: torch.Tensor, data: bytes) -> None:
    """Write ``data`` over all spans, one after the other.

    Args:
        addrs: Start of each span in this process, int64 [n].
        sizes: Its bytes, int64 [n]; their sum is ``len(data)``, which is not 0.
        data: The bytes.
    """
    staging = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    _copy(addrs, staging.data_ptr() + sizes.cumsum(0) - sizes, sizes)


def _copy(dst: torch.Tensor, src: torch.Tensor, sizes: torch.Tensor) -> None:
    _C.copy_runs(_BASE, _BASE, torch.stack([dst, src, sizes], dim=1).contiguous())

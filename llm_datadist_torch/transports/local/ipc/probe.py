# SPDX-License-Identifier: Apache-2.0
"""Whether device memory can be shared between processes here."""

from __future__ import annotations

import itertools

import torch

from llm_datadist_torch.transports.base import HOST_DEVICE
from llm_datadist_torch.transports.local.host import HOST_ONLY
from llm_datadist_torch.transports.local.ipc.runtime import ipc_runtime
from llm_datadist_torch.values.status import LLMFeatureNotEnabledError


def why_not(device: torch.device) -> str:
    """Why an instance can't share device memory with other processes; "" if it can.

    Args:
        device: What ``Placement.DEVICE`` is in it. If it is an NPU, torch_npu has been imported.
    """
    if device.type == HOST_DEVICE.type:
        return HOST_ONLY
    try:
        ipc_runtime()
    except LLMFeatureNotEnabledError as error:
        return str(error.args[0])
    return ""


def look(device: torch.device) -> tuple[str, str, list[tuple[int, int]]]:
    """For ``doctor``: why not, who may use a key, and pairs of NPUs that don't reach each other."""
    problem = why_not(device)
    if problem:
        return problem, "", []
    runtime = ipc_runtime()
    devices = range(torch.get_device_module(device).device_count())
    pairs = itertools.combinations(devices, 2)
    return "", runtime.guard, [pair for pair in pairs if not runtime.reaches(*pair)]

# SPDX-License-Identifier: Apache-2.0
"""What torch_npu says of the NPUs, for ``doctor``, which runs this in a process of its own."""

from __future__ import annotations

import torch

from llm_datadist_torch.memory.device import NPU, why_no_npu
from llm_datadist_torch.memory.npu_address import segment_at, segments_of, torch_npu


def look() -> tuple[list[tuple[str, int]], bool | None, str]:
    """Look at all NPUs, and allocate one small tensor on the first.

    Returns:
        The chip and the bytes of memory of each NPU; whether torch_npu's segments are expandable,
        None where it gave no memory; and why it gave none, else "".

    Raises:
        RuntimeError: torch_npu can't be imported, or the runtime reports an error.
    """
    problem, _ = why_no_npu()
    if problem:
        raise RuntimeError(problem)
    npu = torch_npu().npu
    devices = [
        (str(npu.get_device_name(index)), int(npu.get_device_properties(index).total_memory))
        for index in range(npu.device_count())
    ]
    try:
        expandable = _expandable(torch.device(NPU, 0))
    except (RuntimeError, ValueError) as error:  # a setting that it can't read is a ValueError
        return devices, None, str(error).strip().partition("\n")[0]
    return devices, expandable, ""


def _expandable(device: torch.device) -> bool:
    tensor = torch.empty(1, dtype=torch.uint8, device=device)
    segment = segment_at(segments_of(device), tensor.data_ptr())
    return segment is not None and segment.expandable

# SPDX-License-Identifier: Apache-2.0
"""What went wrong in the Ascend runtime, as typed errors; the C++ code raises them."""

from __future__ import annotations

from llm_datadist_torch.values.status import (
    LLMDeviceError,
    LLMException,
    LLMStatusCode,
    code_2_status,
    error_for,
)

# ACL_ERROR_BAD_ALLOC, ACL_ERROR_RT_MEMORY_ALLOCATION, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL
_OUT_OF_MEMORY = frozenset({200000, 207001, 207018})


def runtime_error(call: str, code: int, detail: str) -> LLMException:
    """The error of an AscendCL function that failed.

    Args:
        call: Its name.
        code: What it returned.
        detail: What ``aclGetRecentErrMsg`` said, "" for nothing.
    """
    message = f"{call} failed with code {code}" + (f": {detail.strip()}" if detail else "")
    if code in _OUT_OF_MEMORY:
        return error_for(LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY, message, op=call)
    # Two codes of the runtime are status codes of their own, the rest has none.
    return LLMDeviceError(message, status_code=code_2_status(code), op=call)


def missing_runtime(reason: str) -> LLMException:
    """The error for device memory in a process without an Ascend runtime."""
    return error_for(
        LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        f"there is no Ascend runtime to copy with: {reason}",
        remedy="import torch_npu before, with CANN installed and its environment set.",
    )

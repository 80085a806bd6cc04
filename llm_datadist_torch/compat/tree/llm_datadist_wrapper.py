# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.llm_datadist_wrapper``: what programs look at of a native module."""

from __future__ import annotations

from llm_datadist_torch.values.status import (
    LLMStatusCode,
)

__all__ = [
    "kSuccess",
]

kSuccess = int(LLMStatusCode.LLM_SUCCESS)  # noqa: N816 (the reference's name)

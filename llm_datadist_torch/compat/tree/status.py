# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.status``."""

from __future__ import annotations

from llm_datadist_torch.values.status import (
    LLMException,
    LLMStatusCode,
    Status,
    code_2_status,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
)

__all__ = [
    "LLMException",
    "LLMStatusCode",
    "Status",
    "code_2_status",
    "handle_llm_status",
    "raise_if_false",
    "raise_if_true",
]

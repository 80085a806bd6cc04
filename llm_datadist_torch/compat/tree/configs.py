# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.configs``. As in the reference, the name ``LLMConfig`` is not in here."""

from __future__ import annotations

from llm_datadist_torch.values.cluster_info import (
    LLMClusterInfo,
)
from llm_datadist_torch.values.config import (
    LlmConfig,
    trans_str_ip,
)
from llm_datadist_torch.values.enums import (
    LLMRole,
)

__all__ = [
    "LLMClusterInfo",
    "LLMRole",
    "LlmConfig",
    "trans_str_ip",
]

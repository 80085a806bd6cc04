# SPDX-License-Identifier: Apache-2.0
"""What the parts of ``CacheManager`` share: the instance, as long as it is open."""

from __future__ import annotations

from llm_datadist_torch.instance import Instance
from llm_datadist_torch.values.status import LLMStatusCode, error_for


class ManagerBase:
    """Holds the instance whose caches are managed."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def _open(self, closed: LLMStatusCode = LLMStatusCode.LLM_FAILED) -> Instance:
        """The instance, unless it has been finalized (reference API, 6.4, names the codes)."""
        if not self._instance.open:
            raise error_for(
                closed,
                "the instance has been finalized, or this is a forked child of its process",
                remedy="call init() in the process that uses it.",
            )
        return self._instance

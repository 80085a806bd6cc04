# SPDX-License-Identifier: Apache-2.0
"""How vLLM hears that a load failed when there are several KV cache groups.

Block ids are unique in one group only. Newer versions take the ids of requests; older ones end on
block ids of several groups, so they are offered no more than one.
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA

from llm_datadist_torch.vllm.foreign import VllmObject

BY_REQUEST = hasattr(base, "KVConnectorTransferResults")
"""Whether failed loads can be told by request."""


class SingleGroup:
    """vLLM turns its hybrid manager off for a connector that is no ``SupportsHMA``."""


GroupSupport: VllmObject = SupportsHMA if BY_REQUEST else SingleGroup
"""The base class that says how many KV cache groups the connector takes."""


def failed_requests(output: VllmObject) -> set[str]:
    """Requests whose loads failed, of what vLLM calls ``KVConnectorOutput``."""
    return getattr(output, "failed_recving", None) or set()


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> VllmObject:
    """What vLLM calls ``KVConnectorTransferResults``."""
    return base.KVConnectorTransferResults(
        finished_sending=sent, finished_recving=received, failed_recving=failed
    )

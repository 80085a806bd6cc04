# SPDX-License-Identifier: Apache-2.0
"""A connector that lets vLLM hand over KV caches by this library.

Only :mod:`llm_datadist_torch.vllm.connector` imports vLLM; the rest can be used and tested without.
"""

from __future__ import annotations

CONNECTOR = "LLMDataDistConnector"
MODULE = "llm_datadist_torch.vllm.connector"


def register() -> None:
    """Make the connector known to vLLM by its name; vLLM calls this as a general plugin.

    May be called again. Nothing but vLLM's factory is imported.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # vLLM has no public way to ask, and loads plugins in each of its processes, some of them twice.
    try:
        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except ValueError:
        return

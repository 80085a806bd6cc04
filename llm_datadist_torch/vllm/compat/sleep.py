# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM tells connectors that the KV's memory goes away, as it does from 0.33 on."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

TOLD_OF_SLEEP = hasattr(KVConnectorBase_V1, "unregister_kv_caches")

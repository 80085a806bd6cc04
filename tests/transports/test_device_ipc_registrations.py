# SPDX-License-Identifier: Apache-2.0
"""Device memory that instances of one process have registered, of which peers may be shown keys."""

from __future__ import annotations

import torch

from llm_datadist_torch import LLMRole
from llm_datadist_torch.transports.base import HOST_DEVICE, MemorySpan
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.transports.local.ipc.exports import EXPORTS
from llm_datadist_torch.values.config import EngineConfig

SPAN = MemorySpan(1 << 46, 4096, torch.device("meta"))


def registered() -> int:
    return EXPORTS._registered[SPAN.address, SPAN.nbytes]


def test_an_instance_ends_its_own_registrations_only() -> None:
    first, second = (LocalTransport(EngineConfig(LLMRole.MIX), HOST_DEVICE) for _ in range(2))
    first.register(SPAN)
    first.register(SPAN)
    second.register(SPAN)
    assert registered() == 3
    for left in (2, 1, 1):
        first.unregister(SPAN)
        first.retire(SPAN._replace(nbytes=64), None)
        assert registered() == left
    second.retire(SPAN, None)
    assert registered() == 0

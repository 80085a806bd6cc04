# SPDX-License-Identifier: Apache-2.0
"""The connector, bent by files in a directory.

It waits in the middle of a pull, or before or in the middle of a push, or loads zeros.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from llm_datadist_torch.vllm.connector import LLMDataDistConnector
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import Place
from llm_datadist_torch.vllm.pulling import Puller
from llm_datadist_torch.vllm.pushing import Sender
from llm_datadist_torch.vllm.steps import Push

DIRECTORY = "BENT_CONNECTOR"
_fetch_rows = Puller.fetch_rows


def _bent(
    self: Puller, peer: int, group: int, src: torch.Tensor, dst: torch.Tensor, deadline: Any
) -> None:
    bends = Path(os.environ[DIRECTORY])
    half = len(src) // 2
    _fetch_rows(self, peer, group, src[half:], dst[half:], deadline)
    if (bends / "hold").exists():
        (bends / "held").touch()
        while (bends / "hold").exists():
            time.sleep(0.01)
    if half:
        _fetch_rows(self, peer, group, src[:half], dst[:half], deadline)
    if (bends / "zero").exists():
        for tensor in self._service.caches[group].tensors:
            tensor[dst] = 0


Puller.fetch_rows = _bent  # type: ignore[method-assign]


_send, _send_layer = Sender._send, Sender._send_layer


def _wait_while(bends: Path, wish: str, transfer_id: str) -> None:
    hold = bends / f"{wish}-{transfer_id}"
    if hold.exists():
        (bends / f"held-{transfer_id}").touch()
        while hold.exists():
            time.sleep(0.01)


def _bent_send(self: Sender, sending: Any, first: Push) -> None:
    _wait_while(Path(os.environ[DIRECTORY]), "before", first.transfer_id)
    _send(self, sending, first)


def _bent_send_layer(self: Sender, peer: Peer, place: Place, given: Any, sums: Any) -> None:
    if given.layer == 2:
        _wait_while(Path(os.environ[DIRECTORY]), "middle", given.push.transfer_id)
    _send_layer(self, peer, place, given, sums)


Sender._send = _bent_send  # type: ignore[method-assign]
Sender._send_layer = _bent_send_layer  # type: ignore[method-assign]


class BentConnector(LLMDataDistConnector):
    """As vLLM loads it by module path."""

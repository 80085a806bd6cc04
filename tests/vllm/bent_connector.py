# SPDX-License-Identifier: Apache-2.0
"""The connector, bent by files in a directory.

It waits in the middle of a pull, or before or in the middle of a push, or loads zeros.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from llm_datadist_torch.vllm.connector import LLMDataDistConnector
from llm_datadist_torch.vllm.mapping import Move
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.worker.pulling import Puller
from llm_datadist_torch.vllm.worker.pushing import Sender
from llm_datadist_torch.vllm.worker.service import TimeLimit

DIRECTORY = "BENT_CONNECTOR"
_fetch_rows = Puller.fetch_rows


def _part(move: Move, rows: slice) -> Move:
    return dataclasses.replace(move, src_rows=move.src_rows[rows], dst_rows=move.dst_rows[rows])


def _bent(self: Puller, peer: int, move: Move, limit: TimeLimit) -> None:
    bends = Path(os.environ[DIRECTORY])
    half = len(move.src_rows) // 2
    _fetch_rows(self, peer, _part(move, slice(half, None)), limit)
    if (bends / "hold").exists():
        (bends / "held").touch()
        while (bends / "hold").exists():
            time.sleep(0.01)
    if half:
        _fetch_rows(self, peer, _part(move, slice(half)), limit)
    if (bends / "zero").exists():
        for layer in move.dst_layers:
            self._service.caches[move.dst_cache].tensors[layer][move.dst_rows] = 0


Puller.fetch_rows = _bent  # type: ignore[method-assign]


_find_target, _send_layer = Sender._find_target, Sender._send_layer


def _wait_while(bends: Path, wish: str, transfer_id: str) -> None:
    gate = bends / f"{wish}-{transfer_id}"
    if gate.exists():
        (bends / f"held-{transfer_id}").touch()
        while gate.exists():
            time.sleep(0.01)


def _bent_find_target(self: Sender, sending: Any, peer: Peer) -> bool:
    _wait_while(Path(os.environ[DIRECTORY]), "before", sending.push.transfer_id)
    return _find_target(self, sending, peer)


def _bent_send_layer(self: Sender, sending: Any, peer: Peer, layer: Any) -> None:
    if ".2." in layer.name:
        _wait_while(Path(os.environ[DIRECTORY]), "middle", sending.push.transfer_id)
    _send_layer(self, sending, peer, layer)


Sender._find_target = _bent_find_target  # type: ignore[method-assign]
Sender._send_layer = _bent_send_layer  # type: ignore[method-assign]


class BentConnector(LLMDataDistConnector):
    """As vLLM loads it by module path."""

# SPDX-License-Identifier: Apache-2.0
"""Two linked nodes, one of them in another process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import llm_datadist_torch as ld
from tests.front_door.service import NodeService
from tests.peers import spawn

SIZE = {"layers": 2, "blocks": 8, "shape": (4, 8), "dtype": torch.int32}
BLOCK_BYTES = 4 * 4 * 8 * 4
"""Of one block in all tensors."""


@pytest.fixture
def linked() -> Iterator[tuple[Any, ld.Node, ld.Cache, ld.Peer]]:
    """A process with node 1 and a cache "kv"; node 2 here, its cache, and the peer."""
    far = spawn(NodeService)
    far.address = far.call("open", cluster_id=1)
    far.call("allocate", name="kv", **SIZE)
    with ld.open(cluster_id=2, timeout_s=20) as node:
        yield far, node, node.allocate(**SIZE), node.connect(far.address)
    far.close()

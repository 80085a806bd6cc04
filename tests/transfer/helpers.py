# SPDX-License-Identifier: Apache-2.0
"""What the tests of links share."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

from llm_datadist_torch import BlocksCacheKey
from tests.peers import Peer, Ref, Service

Peers = Callable[[], Peer]
Services = Callable[[], Service]
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])


def only(status: str) -> tuple[str, list[str]]:
    return status, [status]


def give_block(service: Service, cluster_id: int, colour: int) -> None:
    """A blocks cache under the key (cluster_id, 0), and room for one of the peer's."""
    service.allocate("mine", 2, 2, 64, paged=True, keys=BlocksCacheKey(cluster_id, 0))
    service.allocate("theirs", 2, 2, 64, paged=True)
    service.paint("mine", colour)


def pull_block(service: Any, peer: int) -> Any:
    return service.attempt("pull_blocks", BlocksCacheKey(peer, 0), Ref("theirs"), [0, 1], [0, 1])


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]

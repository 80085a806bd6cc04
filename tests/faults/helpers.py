# SPDX-License-Identifier: Apache-2.0
"""What the fault tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_datadist_torch import BlocksCacheKey, LinkEvent
from tests.peers import Peer, Ref, Service, eventually

Peers = Callable[[], Peer]
ME, PEER = 1, 2
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
NYL, TIMEOUT = "LLM_NOT_YET_LINK", "LLM_TIMEOUT"
THEIRS = BlocksCacheKey(PEER, 0)


def start_peer(peer: Peer, colour: int, listen: str = "127.0.0.1:0", **further: Any) -> int:
    """An instance with a painted blocks cache under THEIRS; returns its port."""
    port = peer.call("start", PEER, listen=listen, **further)
    peer.call("allocate", "theirs", 2, 4, 64, paged=True, keys=THEIRS)
    peer.call("paint", "theirs", colour)
    return port


def start_here(here: Service, **further: Any) -> int:
    """An instance with room for what peers have; returns its port."""
    port = here.start(ME, **further)
    here.allocate("mine", 2, 4, 64, paged=True)
    return port


def pull(service: Any, name: str = "mine", **further: Any) -> Any:
    ids = [0, 1, 2, 3]
    return service.attempt("pull_blocks", THEIRS, Ref(name), ids, ids, **further)


def events_of(here: Service) -> list[LinkEvent]:
    """What happens to the links from now on; the list grows."""
    seen: list[LinkEvent] = []
    here.dd.on_link_event(seen.append)
    return seen


def kinds(seen: list[LinkEvent], count: int) -> list[str]:
    """The kinds of the first events, once there are so many."""
    eventually(lambda: len(seen) >= count)
    return [event.kind for event in seen]


def at_rest(service: Any) -> bool:
    """Nobody uses anything."""
    counters = service("counters") if callable(service) else service.counters()
    return not counters["leases"] and not counters["grants"]

# SPDX-License-Identifier: Apache-2.0
"""The leases that we still hold by links that have ended: each new link tells the peer of them."""

from __future__ import annotations

import threading

from llm_datadist_torch.links.held_leases import HeldLeases
from llm_datadist_torch.serving.messages import MAX_EARLIER

_MOST_PEERS = 64
"""Peers for which ended links are remembered."""


class EarlierLeases:
    """By peer, what the latest links that have ended are still used for.

    A peer that lost a connection keeps what we may still write to. It can't know of a lease whose
    answer, or whose return, was lost with the connection that we don't have it: nothing but a later
    link tells. What is forgotten here stays with the peer until this process ends.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_peer: dict[int, dict[str, HeldLeases]] = {}

    def remember(self, peer: int, name: str, held: HeldLeases) -> None:
        """A link has ended.

        Args:
            peer: Cluster id of the other side.
            name: Of the link.
            held: The leases that we had on it: no more will come.
        """
        with self._lock:
            links = self._by_peer.pop(peer, {})
            self._by_peer[peer] = links
            links[name] = held
            if len(links) > MAX_EARLIER:
                unused = (each for each, leases in links.items() if not leases.in_use())
                del links[next(unused, next(iter(links)))]
            if len(self._by_peer) > _MOST_PEERS:
                del self._by_peer[next(iter(self._by_peer))]

    def of(self, peer: int) -> dict[str, list[int]]:
        """Name of each link to a peer that has ended -> the leases of it that are in use."""
        with self._lock:
            links = list(self._by_peer.get(peer, {}).items())
        return {name: held.in_use() for name, held in links}

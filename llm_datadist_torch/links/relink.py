# SPDX-License-Identifier: Apache-2.0
"""Relinking lost links when they are used."""

from __future__ import annotations

import logging
import time
import weakref

from llm_datadist_torch.links.handshake import Handshake
from llm_datadist_torch.links.link import Link, RelinkState, RelinkTurn
from llm_datadist_torch.links.registry import LinkRegistry
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_LONGEST_PAUSE_S = 0.5
_TURN_RETRY_S = 0.002


class Relinker:
    """Finds links to use, and relinks lost ones.

    Only links that this side dialed, or knows where to dial: the peer does so for the others. Each
    use tries once; between two tries that fail there is a pause, which doubles.

    Thread safety: all methods may be called from any thread.

    Args:
        registry: The links.
        handshake: Asks for links.
        enabled: Whether lost links are relinked at all.
    """

    def __init__(self, registry: LinkRegistry, handshake: Handshake, *, enabled: bool) -> None:
        self._registry = registry
        self._handshake = handshake
        self._enabled = enabled

    def find(self, peer: int) -> Link:
        """The link to ``peer``, as it is.

        Raises:
            LLMNotLinkedError: There is none, or it was lost.
        """
        link = self._registry.get(peer)
        if link is None:
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK, f"cluster {peer} is not linked", peer=peer
            )
        link.check_linked()
        return link

    def use(self, peer: int, deadline: Deadline) -> Link:
        """The link to ``peer``; a lost one is relinked. Blocks then, at most until the deadline.

        Raises:
            LLMNotLinkedError: There is none, or it was lost and the peer is not back.
        """
        link = self._registry.get(peer)
        lost = link is not None and link.state is LinkState.LOST
        if link is not None and lost and self._enabled and link.address is not None:
            self._relink(link, deadline)
        return self.find(peer)

    def _relink(self, lost: Link, deadline: Deadline) -> None:
        state = lost.relink
        turn = RelinkTurn()
        try:
            if not _take(state, turn, deadline):
                return
            pause = state.retry_at - time.monotonic()
            # Somebody whose turn it was before, or the peer, may have linked meanwhile.
            if self._registry.get(lost.peer) is not lost or pause > deadline.remaining_s():
                return
            time.sleep(max(0.0, pause))
            status = self._handshake.link_again(lost, deadline)
            if status != LLMStatusCode.LLM_SUCCESS:
                logger.info("cluster %d can't be linked again: %s", lost.peer, status.name)
                state.retry_at = time.monotonic() + state.pause_s
                state.pause_s = min(2 * state.pause_s, _LONGEST_PAUSE_S)
        finally:
            turn.ended = True


def _take(state: RelinkState, turn: RelinkTurn, deadline: Deadline) -> bool:
    """Wait for the turn to try; whether it has come before the deadline."""
    while True:
        with state.lock:
            before = None if state.turn is None else state.turn()
            if before is None or before.ended:
                state.turn = weakref.ref(turn)
                return True
        if deadline.expired:
            return False
        time.sleep(_TURN_RETRY_S)

# SPDX-License-Identifier: Apache-2.0
"""What users are told of a link."""

from __future__ import annotations

from dataclasses import dataclass

from llm_datadist_torch.links.link import Link
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.transports.choice import Choice


@dataclass(frozen=True)
class LinkInfo:
    """One link, as it was when ``LLMDataDist.links()`` looked.

    Attributes:
        peer: The peer's cluster id.
        state: "linked", or "lost": the peer is gone and has not been unlinked.
        since: When it came into this state, as ``time.time()`` has it.
        dialed: Whether this side called for it; else the peer did.
        reason: Why it was lost; empty while it is linked.
        identified_by: How the peer's process is known, so that it is noticed when it has ended and
            never taken for another one: "pidfd", or "pid and start time" where the kernel has no
            pidfds; empty for a peer that is not known to be on this host.
        not_local: Why it is not known to be on this host; empty where it is.
        choices: Which transport moves which kind of memory, and why; empty for a lost link.
    """

    peer: int
    state: str
    since: float
    dialed: bool
    reason: str
    choices: tuple[Choice, ...]
    identified_by: str = ""
    not_local: str = ""

    @classmethod
    def of(cls, link: Link) -> LinkInfo:
        """Look at a link."""
        choices = link.channel.choices if link.state is LinkState.LINKED else ()
        process = link.connection.process
        return cls(
            link.peer,
            link.state.value,
            link.since,
            link.dialed,
            link.lost_because,
            choices,
            "" if process is None else process.identified_by,
            link.connection.not_local,
        )

    def transport(self, memory: str = "device") -> str | None:
        """Name of the transport for "host" or "device" memory; None if none moves it."""
        return next((choice.transport for choice in self.choices if choice.memory == memory), None)

# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half of the connector tells the workers in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_datadist_torch.vllm.params import Peer, RemoteBlocks


@dataclass(frozen=True)
class Pull:
    """Fetch the blocks of a prompt, or only release them.

    Attributes:
        request_id: The consumer's request.
        remote: Where the blocks are.
        local_blocks: The request's blocks, from the first token on; empty if there is nothing to
            fetch.
        first_token: Tokens that are there already: a whole number of blocks.
        num_tokens: Tokens that shall be there afterwards.
        awaited: Whether the engine waits for this.
    """

    request_id: str
    remote: RemoteBlocks
    local_blocks: tuple[int, ...] = ()
    first_token: int = 0
    num_tokens: int = 0
    awaited: bool = True


@dataclass(frozen=True)
class Grant:
    """Keep blocks for a consumer; see :class:`~.leases.Leases`."""

    number: int
    request_id: str
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Expect:
    """With "push": blocks that a producer will write.

    Attributes:
        transfer_id: Which it names them by.
        pull: What a pull would fetch; its ``remote`` is not used.
    """

    transfer_id: str
    request_id: str
    local_blocks: tuple[int, ...]
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class Push:
    """With "push": blocks that this step completes, to be sent layer by layer.

    Attributes:
        transfer_id: See :class:`Expect`.
        request_id: The producer's request.
        peers: The consumer's workers.
        blocks: All blocks of the prompt so far, from the first token on.
        first_block: The first of them that this step completes.
        num_tokens: Tokens of the whole prompt.
        prompt: Its digest.
        last: Whether the prompt is complete with this step.
    """

    transfer_id: str
    request_id: str
    peers: tuple[Peer, ...]
    blocks: tuple[int, ...]
    first_block: int
    num_tokens: int
    prompt: str
    last: bool


@dataclass
class Step:
    """All of one step."""

    pulls: list[Pull] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    expects: list[Expect] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    # Requests of the producer that have finished, and whose pushes the engine waits for.
    push_ends: list[str] = field(default_factory=list)

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
    """With "push": blocks that a producer will write; the engine waits for them.

    Attributes:
        request_id: The consumer's request.
        transfer_id: What both requests call it.
        blocks: The request's blocks, from the first token on; empty if nothing is wanted any more,
            and the engine does not wait.
        first_token: Tokens that are there already: a whole number of blocks.
        num_tokens: Tokens that shall be there afterwards.
        prompt: Digest of the prompt.
    """

    request_id: str
    transfer_id: str
    blocks: tuple[int, ...]
    first_token: int
    num_tokens: int
    prompt: str


@dataclass(frozen=True)
class Push:
    """With "push": blocks that this step completes, to be sent layer by layer.

    Attributes:
        request_id: The producer's request.
        transfer_id: What both requests call it.
        peers: The consumer's workers.
        blocks: The blocks of the prompt that are complete after this step, from the first token on.
        first_block: How many of them have been sent in steps before.
        prompt: Digest of the prompt.
        last: Whether the prompt is complete after this step.
    """

    request_id: str
    transfer_id: str
    peers: tuple[Peer, ...]
    blocks: tuple[int, ...]
    first_block: int
    prompt: str
    last: bool


@dataclass(frozen=True)
class PushEnd:
    """With "push": a request that has ended; what it has not begun to send it never will.

    Attributes:
        request_id: The producer's request.
        transfer_id: What both requests call it.
        peers: The consumer's workers.
        kept: Whether its blocks are kept until they have been sent.
    """

    request_id: str
    transfer_id: str
    peers: tuple[Peer, ...]
    kept: bool = True


@dataclass
class Step:
    """All of one step.

    Attributes:
        pulls: What to fetch.
        grants: What to keep.
        expects: What to let others write.
        pushes: What to write.
        push_ends: Requests that have ended, and were to be sent.
    """

    pulls: list[Pull] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    expects: list[Expect] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    push_ends: list[PushEnd] = field(default_factory=list)

# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half of the connector tells the workers in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_datadist_torch.vllm.params import BlockIds, Peer, RemoteBlocks


@dataclass(frozen=True)
class Pull:
    """Fetch the blocks of a prompt, or only release them.

    Attributes:
        request_id: The consumer's request.
        remote: Where the blocks are.
        local_blocks: The request's blocks; empty if there is nothing to fetch.
        first_token: Tokens that are there already: a whole number of blocks.
        num_tokens: Tokens that must be there afterwards.
        awaited: Whether the engine waits for this.
    """

    request_id: str
    remote: RemoteBlocks
    local_blocks: BlockIds = ()
    first_token: int = 0
    num_tokens: int = 0
    awaited: bool = True


@dataclass(frozen=True)
class Renewal:
    """Keep a producer's lease for a request that is queued, until it is pulled or dropped."""

    request_id: str
    remote: RemoteBlocks


@dataclass(frozen=True)
class Grant:
    """Keep blocks for a consumer; see :class:`~.worker.leases.Leases`."""

    number: int
    request_id: str
    blocks: BlockIds


@dataclass(frozen=True)
class Expect:
    """With "push": blocks that a producer will write; the engine waits for them.

    Attributes:
        request_id: The consumer's request.
        transfer_id: What both requests call it.
        blocks: The request's blocks; empty if nothing is wanted any more, and the engine does not
            wait.
        first_token: Tokens that are there already: a whole number of blocks.
        num_tokens: Tokens that must be there afterwards.
        prompt: Digest of the prompt.
    """

    request_id: str
    transfer_id: str
    blocks: BlockIds
    first_token: int
    num_tokens: int
    prompt: str


@dataclass(frozen=True)
class Push:
    """With "push": tokens that this step computes, to be sent layer by layer.

    Attributes:
        request_id: The producer's request.
        transfer_id: What both requests call it.
        peers: The consumer's workers.
        blocks: The request's blocks.
        first_token: Tokens of which whole blocks have been sent in steps before.
        num_tokens: Tokens of the prompt that are there after this step.
        prompt: Digest of the prompt.
        last: Whether the prompt is complete after this step. If not, blocks that are not full are
            not sent yet.
    """

    request_id: str
    transfer_id: str
    peers: tuple[Peer, ...]
    blocks: BlockIds
    first_token: int
    num_tokens: int
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
        renewals: Leases to keep for requests that are queued.
        drops: Requests whose leases need not be kept any more.
        grants: What to keep.
        expects: What to let others write.
        pushes: What to write.
        push_ends: Requests that have ended, and were to be sent.
        preempted: Requests whose blocks are others' from this step on.
        reset: Whether what was granted before is not kept any more.
    """

    pulls: list[Pull] = field(default_factory=list)
    renewals: list[Renewal] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    expects: list[Expect] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    push_ends: list[PushEnd] = field(default_factory=list)
    preempted: tuple[str, ...] = ()
    reset: bool = False

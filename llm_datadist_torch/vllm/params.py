# SPDX-License-Identifier: Apache-2.0
"""``kv_transfer_params``: what a producer tells a consumer, by way of the proxy, as JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llm_datadist_torch.values.checks import param_error

BlockIds = tuple[tuple[int, ...], ...]
"""A request's blocks: per KV cache group, in order from the first token on."""

_SHORTEST_LEASE_S, _LONGEST_LEASE_S = 0.1, 86400.0

MAX_PEERS = 4096
"""Workers of an engine."""

NULL_BLOCK = 0
"""vLLM's block that belongs to nobody: it stands where a group needs no block
(findings/vllm_window_blocks_are_block_zero.sh)."""


_encode_tokens = msgspec.msgpack.Encoder(enc_hook=int).encode


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """One worker, as a JSON array.

    Attributes:
        cluster_id: Its cluster id; users may have typed it, so it identifies nobody.
        host: Address or name at which peers reach it.
        port: The port there.
        life: Random text that a worker chooses when it starts, so that two workers, or two lives of
            one, never have the same. Empty where it is not known: with "push" the proxy names
            consumers by their address.
    """

    cluster_id: int
    host: str
    port: int
    life: str = ""

    def __str__(self) -> str:
        """Its id and address, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"worker {self.cluster_id} at {host}:{self.port}"


class RemoteBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks of a finished prompt, and where they are.

    Attributes:
        remote_engine_id: The engine that has them.
        remote_request_id: Its request.
        remote_lease: Number of the lease under which it keeps them, counted in one life of the
            engine; see :class:`~.worker.leases.Leases`.
        remote_lease_s: Seconds that a claim keeps the lease.
        remote_peers: Its workers, by pipeline rank and then by tensor-parallel rank.
        remote_tp_size: Its tensor-parallel size.
        remote_block_ids: The request's blocks.
        remote_num_tokens: Tokens that are in them.
        prompt: Digest of the prompt, see :func:`prompt_digest`.
    """

    remote_engine_id: str
    remote_request_id: str
    remote_lease: int
    remote_lease_s: float
    remote_peers: tuple[Peer, ...]
    remote_tp_size: int
    remote_block_ids: BlockIds
    remote_num_tokens: int
    prompt: str

    @property
    def name(self) -> tuple[str, int]:
        """The same for all requests that name the same blocks, and for no others."""
        return self.remote_peers[0].life, self.remote_lease

    def to_params(self) -> dict[str, Any]:
        """The JSON object for the consumer's request."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {"do_remote_prefill": True, "do_remote_decode": False, **fields}

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> RemoteBlocks:
        """What is in the JSON object. Other keys are left alone.

        Raises:
            LLMParamError: Something is missing, or of a wrong type or value.
        """
        try:
            found = msgspec.convert(dict(params), cls)
        except msgspec.ValidationError as error:
            raise param_error(
                f"kv_transfer_params: {error}",
                remedy="pass on what the producer answered, unchanged.",
            ) from None
        peers, size = len(found.remote_peers), found.remote_tp_size
        if not 1 <= peers <= MAX_PEERS or size < 1 or peers % size or found.remote_num_tokens < 0:
            raise param_error(
                f"kv_transfer_params: {peers} peers, tensor parallel size {size},"
                f" {found.remote_num_tokens} tokens"
            )
        # Written so that it refuses what is not a number, too.
        if not _SHORTEST_LEASE_S <= found.remote_lease_s <= _LONGEST_LEASE_S:
            raise param_error(
                f"kv_transfer_params: remote_lease_s={found.remote_lease_s} is out of range"
                f" [{_SHORTEST_LEASE_S}, {_LONGEST_LEASE_S}]"
            )
        if not all(peer.life for peer in found.remote_peers):
            raise param_error(
                "kv_transfer_params: a peer has no life",
                remedy="pass on what the producer answered, unchanged.",
            )
        return found


class PushTarget(msgspec.Struct, frozen=True, kw_only=True):
    """With "push": where a producer sends the blocks of a prompt, or a consumer expects them.

    Attributes:
        transfer_id: The same in both requests, and in no other.
        remote_peers: The consumer's workers, in the producer's request; see :class:`RemoteBlocks`.
    """

    transfer_id: str
    remote_peers: tuple[Peer, ...] = ()

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> PushTarget:
        """What is in the JSON object.

        Raises:
            LLMParamError: As for :meth:`RemoteBlocks.of`.
        """
        try:
            return msgspec.convert(dict(params), cls)
        except msgspec.ValidationError as error:
            raise param_error(
                f"kv_transfer_params: {error}",
                remedy='with "push" both requests carry the same transfer_id.',
            ) from None


def prompt_digest(token_ids: Sequence[int], further: Sequence[str] = ()) -> str:
    """A digest of what a prompt's KV depends on, besides the model.

    Args:
        token_ids: The prompt.
        further: Whatever else counts: adapters, hashes of images.
    """
    # The fastest way from Python's numbers to bytes: this is done in the engine's loop.
    digest = hashlib.blake2b(_encode_tokens(list(token_ids)), digest_size=12)
    for each in further:
        digest.update(b"\0" + each.encode())
    return digest.hexdigest()

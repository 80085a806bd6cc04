# SPDX-License-Identifier: Apache-2.0
"""``kv_transfer_params``: what a producer tells a consumer, by way of the proxy, as JSON."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llm_datadist_torch.values.checks import param_error

Peer = tuple[int, str, int]
"""Cluster id, host and port of one worker."""


class RemoteBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks of a finished prompt, and where they are.

    Attributes:
        remote_engine_id: The engine that has them.
        remote_request_id: Its request.
        remote_lease: Number under which it keeps them; see :class:`~.leases.Leases`.
        remote_peers: Its workers, in order of their tensor-parallel rank.
        remote_block_ids: The request's blocks in order, from the first token on.
        remote_num_tokens: Tokens that are in them.
        prompt: Digest of the prompt, see :func:`prompt_digest`.
        digest: Digest of what must be equal to move whole blocks; see :mod:`.fingerprint`.
    """

    remote_engine_id: str
    remote_request_id: str
    remote_lease: int
    remote_peers: tuple[Peer, ...]
    remote_block_ids: tuple[int, ...]
    remote_num_tokens: int
    prompt: str
    digest: str

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
        if not found.remote_peers or found.remote_num_tokens < 0:
            raise param_error(
                f"kv_transfer_params: {len(found.remote_peers)} peers,"
                f" {found.remote_num_tokens} tokens"
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
        further: Whatever else counts: names of adapters, hashes of images.
    """
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=12)
    for each in further:
        digest.update(b"\0" + each.encode())
    return digest.hexdigest()

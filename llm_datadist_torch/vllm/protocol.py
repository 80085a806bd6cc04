# SPDX-License-Identifier: Apache-2.0
"""What workers ask each other over their links: msgpack, typed, one tagged union."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import KVLayout


class Describe(msgspec.Struct, frozen=True, tag=True):
    """What have you got? Answered by :class:`Description`."""


class Description(msgspec.Struct, frozen=True):
    """What a worker has got."""

    fingerprint: Fingerprint
    layout: KVLayout


class Claim(msgspec.Struct, frozen=True, tag=True):
    """I am about to read; ``readers`` of us will. Answered by :class:`Verdict`."""

    lease: int
    readers: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """I have read. Answered by :class:`Verdict`."""

    lease: int


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Checksums of these rows of one group, native int64. Answered by :class:`Sums`."""

    lease: int
    group: int
    rows: bytes


class Where(msgspec.Struct, frozen=True, tag=True):
    """Where do I write the blocks of this transfer? Answered by :class:`Place`."""

    transfer_id: str


class Pushed(msgspec.Struct, frozen=True, tag=True):
    """They have been written, or will not be. Answered by :class:`Verdict`.

    Attributes:
        transfer_id: Which.
        complete: Whether all have been written.
        sums: Checksums of what was written, per group one for each block, if they are wanted.
    """

    transfer_id: str
    complete: bool
    sums: tuple[tuple[int, ...], ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Where blocks are expected.

    Attributes:
        known: Whether they are, so far: else ask again.
        wanted: Whether they still are.
        model_ids: Names of the blocks caches to write to, which end with the transfer.
        blocks: The request's blocks, from the first token on.
        first_token: Tokens that are there already.
        num_tokens: Tokens that shall be there.
        prompt: Digest of the prompt.
        digest: Digest of what must be equal to move whole blocks.
        verify: Whether checksums are wanted.
    """

    known: bool
    wanted: bool = True
    model_ids: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    first_token: int = 0
    num_tokens: int = 0
    prompt: str = ""
    digest: str = ""
    verify: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """Whether the lease is there."""

    held: bool


class Sums(msgspec.Struct, frozen=True):
    """One checksum per row over all layers; None while they are being computed: ask again."""

    sums: list[int] | None


Asked: TypeAlias = Describe | Claim | Release | Checksums | Where | Pushed

encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Asked] = msgspec.msgpack.Decoder(Asked)


def decode_question(payload: bytes) -> Asked:
    """The question in these bytes.

    Raises:
        LLMParamError: There is none.
    """
    try:
        question: Asked = _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise param_error(f"{len(payload)} bytes are no question of a connector: {error}") from None
    return question

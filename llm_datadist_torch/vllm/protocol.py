# SPDX-License-Identifier: Apache-2.0
"""What workers ask each other over their links: msgpack, typed, one tagged union.

Each message that means one worker carries that worker's ``life``; another one, or another life of
the same, answers that it holds nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.params import Peer

NUMBERS_PER_MESSAGE = 100_000
"""32-bit numbers that one message carries at most: a message has at most 1 MiB."""


class Process(msgspec.Struct, frozen=True):
    """A process, as the kernel of its host knows it; see :mod:`.worker.processes`.

    Attributes:
        host: Random text that the kernel chose when it booted.
        namespace: Inode of its PID namespace.
        pid: Its pid there.
        started: When it was started, in clock ticks after the boot.
    """

    host: str
    namespace: int
    pid: int
    started: int


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Who are you, and what have you got? Answered by :class:`Description`."""


class Description(msgspec.Struct, frozen=True):
    """What a worker is and has."""

    life: str
    fingerprint: Fingerprint
    layout: KVLayout


class Claim(msgspec.Struct, frozen=True, tag=True):
    """The leases that I am about to use, and how many readers each has. See :class:`Verdicts`."""

    life: str
    leases: tuple[int, ...]
    readers: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """I have read. Answered by :class:`Verdict`."""

    life: str
    lease: int
    readers: int


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Checksums of rows of one cache, over some layers. Answered by :class:`Sums`.

    Attributes:
        life: Of the owner.
        lease: Under which the rows are kept.
        cache: Index of the cache.
        layers: The first, and the one after the last.
        rows: Native int64.
    """

    life: str
    lease: int
    cache: int
    layers: tuple[int, int]
    rows: bytes


class Where(msgspec.Struct, frozen=True, tag=True):
    """Where do I write the blocks of this transfer? Answered by :class:`Place`.

    Attributes:
        transfer_id: Which.
        writer: The asking worker.
        process: The process that will write.
        offset: Numbers of :attr:`Place.blocks` that are known already.
    """

    transfer_id: str
    writer: Peer
    process: Process
    offset: int = 0


class Place(msgspec.Struct, frozen=True):
    """Where blocks are expected.

    Attributes:
        known: Whether they are, so far: else ask again.
        wanted: Whether they still are.
        life: Who expects them.
        model_ids: Names of the blocks caches to write to, which end with the transfer.
        counts: Blocks of each KV cache group.
        blocks: The request's blocks of all groups, from ``Where.offset`` on, native int32.
        first_token: Tokens that are there already.
        num_tokens: Tokens that must be there.
        prompt: Digest of the prompt.
        digest: Digest of what must be equal to move whole blocks.
        verify: Whether checksums are wanted.
    """

    known: bool
    wanted: bool = True
    life: str = ""
    model_ids: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    blocks: bytes = b""
    first_token: int = 0
    num_tokens: int = 0
    prompt: str = ""
    digest: str = ""
    verify: bool = False


class PushedSums(msgspec.Struct, frozen=True, tag=True):
    """Checksums of what was written to one cache. Answered by :class:`Verdict`.

    Attributes:
        life: Of the consumer.
        transfer_id: Which.
        cache: Index of the cache.
        rows: Rows of the consumer's cache, native int32.
        sums: One for each of them over all layers, native uint32.
    """

    life: str
    transfer_id: str
    cache: int
    rows: bytes
    sums: bytes


class Pushed(msgspec.Struct, frozen=True, tag=True):
    """The writer has stopped. Answered by :class:`Verdict`.

    Attributes:
        life: Of the consumer; empty if the writer never knew it.
        transfer_id: Which.
        writer: The life of the writer.
        complete: Whether all has been written.
    """

    life: str
    transfer_id: str
    writer: str
    complete: bool


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Stop writing. Answered by :class:`Verdict`: held once nothing will be written any more."""

    life: str
    transfer_id: str


class Verdict(msgspec.Struct, frozen=True):
    """Whether something is so: the lease is there, the writer has stopped. None: ask again."""

    held: bool | None


class Verdicts(msgspec.Struct, frozen=True):
    """The same for each of :attr:`Claim.leases`."""

    held: tuple[bool | None, ...]


class Sums(msgspec.Struct, frozen=True):
    """One checksum per row over all layers; None while they are being computed: ask again."""

    sums: list[int] | None


Asked: TypeAlias = Describe | Claim | Release | Checksums | Where | PushedSums | Pushed | Stop

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


def packed(numbers: Iterable[int], kind: str = "i") -> bytes:
    """Numbers as native 32-bit ones: "i" signed, "I" unsigned."""
    return array(kind, numbers).tobytes()


def unpacked(payload: bytes, kind: str = "i") -> list[int]:
    """The numbers again.

    Raises:
        LLMParamError: No whole number of them.
    """
    numbers = array(kind)
    if len(payload) % numbers.itemsize:
        raise param_error(f"{len(payload)} bytes are no whole number of 32-bit numbers")
    numbers.frombytes(payload)
    return list(numbers)

# SPDX-License-Identifier: Apache-2.0
"""The messages of the control plane: msgpack, typed, one tagged union.

A message travels as an :class:`Envelope`; relayed bytes follow it as they are. A change of these
types is a new ``WIRE_VERSION``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from llm_datadist_torch.net.framing import MAX_FRAME_BYTES
from llm_datadist_torch.transports.base import CacheVersion, RegionView
from llm_datadist_torch.values.checks import UINT16_MAX
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, message_of

MAX_MESSAGE_BYTES = MAX_FRAME_BYTES
"""Of a message, and of the data behind it. Relayed bytes come in pieces of 4 MiB."""

MAX_NAME = 256
"""Characters of names and ids that peers choose."""
MAX_OFFERS = 16
MAX_MEMBERS = 4
"""Of a communicator."""
MAX_EARLIER = 16
"""Links that have ended of which the sides tell each other when they link again."""
ANY_PEER = -1
"""As the expected id of a ``Hello``: only say who answers, and make no link."""

Id = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Offers = Annotated[dict[Name, bytes], msgspec.Meta(max_length=MAX_OFFERS)]
Earlier = Annotated[dict[Name, list[Id]], msgspec.Meta(max_length=MAX_EARLIER)]


class Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that is said on a link."""


class Hello(Message):
    """First message of the side that calls ``link_clusters``.

    Attributes:
        cluster_id: The sender's id.
        expected_id: The id of the peer that it wants to reach, or ``ANY_PEER``.
        epoch: Random name of the sender's life from init to finalize.
        remote_accessible: Its ``enable_remote_cache_accessible``; both sides must agree (reference
            API, 9.3).
        offers: Transport name -> that transport's offer.
        owner: What the link is for; see :class:`Join`.
        name: Random name of the link that is asked for.
        lost: Name of the link that the sender has lost; if it is left here, it makes room.
        earlier: Name of each earlier link to the same peer -> its leases that the sender still
            uses. All other leases that it had by them are over.
    """

    cluster_id: Id
    expected_id: int
    epoch: Name
    remote_accessible: bool
    offers: Offers
    owner: Name = ""
    name: Name = ""
    lost: Name = ""
    earlier: Earlier = {}


class Welcome(Message):
    """The answer to :class:`Hello`, which has the same fields.

    It makes the link, unless ``ANY_PEER`` was asked for.
    """

    cluster_id: Id
    epoch: Name
    offers: Offers
    earlier: Earlier = {}


class Refused(Message):
    """Any request that failed.

    The status and the text of the error, and whose cache it was about.
    """

    status: int
    text: str


def refused(error: BaseException) -> Refused:
    """What a peer is told of an error; its side adds the remedy again, from the status."""
    if isinstance(error, LLMException):
        return Refused(int(error.status_code), message_of(error))
    return Refused(int(LLMStatusCode.LLM_FAILED), f"{type(error).__name__} at the peer: {error}")


class Resolve(Message):
    """Where is the cache of this key, and may I use it for one transfer?

    Answered by :class:`CacheView`, with a lease.

    Attributes:
        kind: "request", "prefix", "blocks", "id", or "address".
        value: Request id, prefix id, cache id or address; 0 for "blocks".
        index: Model id of a key; row of an id.
        paged: The kind of cache that the asker can use; None for either.
        write: The asker wants to write to it.
    """

    kind: Name
    value: int
    index: int
    paged: bool | None
    write: bool


class CacheView(Message):
    """A cache as a peer sees it, with a lease on it.

    Attributes:
        lease_id: To be given back by :class:`Release`.
        cache_id: Its id at the owner.
        num_tensors: See :class:`~llm_datadist_torch.values.layout.Layout`; so are the next four.
        rows: Rows or blocks.
        row_bytes: Bytes of one.
        row_stride_bytes: Bytes between the starts of two.
        paged: Blocks cache or contiguous.
        row: The row that the key names.
        addrs: Addresses of the tensors in the owner's process, native int64 [num_tensors].
        region: Region that all tensors lie in, or None for memory its user registered.
        unowned: Registered by bare addresses.
        device: Where it lies in the owner's process: "cpu", or such as "npu:0".
        version: By which the asker can see whether this still holds; None where it must ask.
        owner_validates: Its memory is its user's, who may move it without changing the version:
            only the owner can tell where it is, each time.
    """

    lease_id: int
    cache_id: int
    num_tensors: int
    rows: int
    row_bytes: int
    row_stride_bytes: int
    paged: bool
    row: int
    addrs: bytes
    region: RegionView | None
    unowned: bool
    device: str
    version: CacheVersion | None
    owner_validates: bool


class Release(Message):
    """Give a lease back. No answer.

    ``fetched`` are the tensors [start, stop) that a pull has completely read from the leased row.

    Attributes:
        lease_id: Which.
        fetched: See above; None for nothing.
        link: Name of the earlier link of these two that it was given on; "" for this one.
    """

    lease_id: int
    fetched: tuple[int, int] | None
    link: Name = ""


class Claim(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """In place of a lease: a lease for the one request that it comes with.

    Refused, unless the cache and the row are still what the peer has said before.

    Attributes:
        query: What was asked then.
        cache_id: What was answered.
        row: What was answered.
    """

    query: Resolve
    cache_id: int
    row: int


class ReadBytes(Message):
    """Send me these spans of the leased cache.

    Native int64 [n, 2] of (address, nbytes). Answered by :class:`Done` and a data frame.
    """

    lease_id: int
    spans: bytes
    claim: Claim | None = None


class WriteBytes(Message):
    """Write the data frame over these spans of the leased cache. Answered by :class:`Done`."""

    lease_id: int
    spans: bytes


class Call(Message):
    """A transport's channel asks the one on the other side. Answered by :class:`Called`.

    Attributes:
        lease_id: The leased cache that it is about.
        transport: Which one.
        payload: What it says.
        claim: In place of a lease.
    """

    lease_id: int
    transport: Name
    payload: bytes
    claim: Claim | None = None


class Called(Message):
    """The answer to a :class:`Call`."""

    payload: bytes


class Note(Message):
    """A transport's channel tells the one on the other side. No answer."""

    transport: Name
    payload: bytes


class Done(Message):
    """The request has been carried out."""


class ShareRegion(Message):
    """Send me a descriptor of this region, of a cache that I was told of.

    Over a Unix socket only. Answered by :class:`Done` with the descriptor.
    """

    region_id: Id


class RegionFreed(Message):
    """The region is gone: unmap it. No answer."""

    region_id: int


class Join(Message):
    """Keep this link for one more purpose. Answered by :class:`Done`.

    Attributes:
        owner: The purpose: "" for ``link_clusters``, else the token of a communicator.
    """

    owner: Name


class Unlink(Message):
    """The link ends here and now, answered by :class:`Done` when an answer is wanted."""


class MemberInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member of a communicator says of itself.

    Attributes:
        cluster_id: The member's id.
        epoch: Random name of its life from init to finalize.
        host: Where the other members can dial it.
        port: Where the other members can dial it.
    """

    cluster_id: Id
    epoch: Name
    host: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=UINT16_MAX)]


class JoinMeeting(Message):
    """A member of a communicator comes to the first one. Answered by :class:`MeetingToken`.

    Attributes:
        name: SHA-256 of the communicator's name.
        members: (rank, cluster id) of all members, in order of the ranks.
        place: Which of them comes.
    """

    name: Name
    members: Annotated[list[tuple[Id, Id]], msgspec.Meta(max_length=MAX_MEMBERS)]
    place: int


class MeetingToken(Message):
    """What the links of this communicator will be held for; see :class:`Join`."""

    token: Name


class EnterMeeting(Message):
    """The member can be dialed for the token now.

    Answered by :class:`MeetingMembers` once that holds for all members.
    """

    member: MemberInfo


class MeetingMembers(Message):
    """What all members say of themselves, in order of their ranks."""

    members: Annotated[list[MemberInfo], msgspec.Meta(max_length=MAX_MEMBERS)]


class Question(Message):
    """The user of this instance asks the user of the peer. Answered by :class:`Answer`."""

    payload: bytes


class Answer(Message):
    """What the user of the peer says to a :class:`Question`."""

    payload: bytes


Body = (
    Hello
    | Welcome
    | Refused
    | Resolve
    | CacheView
    | Release
    | ReadBytes
    | WriteBytes
    | Call
    | Called
    | Note
    | Done
    | RegionFreed
    | ShareRegion
    | Join
    | Unlink
    | JoinMeeting
    | MeetingToken
    | EnterMeeting
    | MeetingMembers
    | Question
    | Answer
)


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message on the wire.

    Attributes:
        request_id: Number of the request at its sender; 0 where no answer is wanted.
        reply: Whether this answers the request of that number.
        body: The message.
    """

    request_id: int
    reply: bool
    body: Body


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(envelope)


def decode(frame: bytes | memoryview) -> Envelope:
    """The message of these bytes.

    What is nested deeper than the types of the messages are, or has more members, is not a message.

    Raises:
        msgspec.DecodeError: They are none.
    """
    try:
        return _decoder.decode(frame)
    except (ValueError, RecursionError) as error:
        # Texts that are no UTF-8, and nesting without end.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None

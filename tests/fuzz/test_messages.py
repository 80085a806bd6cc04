# SPDX-License-Identifier: Apache-2.0
"""The decoder: whatever comes is a message or a DecodeError."""

from __future__ import annotations

import random
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, decode, encode
from tests.fuzz.messages import CORPUS, broken, deep


def taken(data: bytes) -> Envelope | None:
    try:
        envelope = decode(data)
    except msgspec.DecodeError:
        return None
    assert type(envelope) is Envelope
    assert isinstance(envelope.body, messages.Message)
    return envelope


@pytest.mark.parametrize("body", CORPUS, ids=lambda body: type(body).__name__)
def test_the_corpus_is_whole(body: messages.Message) -> None:
    envelope = Envelope(7, False, body)  # type: ignore[arg-type]
    assert decode(encode(envelope)) == envelope


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_bytes(data: bytes) -> None:
    taken(data)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32))
def test_broken_messages(seed: int) -> None:
    rng = random.Random(seed)
    envelope = taken(broken(rng))
    if envelope is not None:
        assert decode(encode(envelope)) == envelope or envelope != envelope


@pytest.mark.parametrize("levels", [6, 100, 1000, 10_000, 1_000_000])
def test_deep_nesting(levels: int) -> None:
    """Wherever it is: as the message, in a field, behind the last field, in what is not known."""
    nested = deep(levels)
    began = time.monotonic()
    for data in (
        nested,
        b"\x93\x01\xc2" + nested,
        b"\x94\x01\xc2\x91\xa4Done" + nested,
        b"\x93\x01\xc2\x92\xa4Done" + nested,
        b"\x93\x01\xc2\x92\xa7Release" + nested,
        b"\x93\x01\xc2\x9a\xa5Hello\x03\x03\x01\xa1e\xc2\x81\xa5local" + nested,
    ):
        assert taken(data) is None
    assert time.monotonic() - began < 60


def test_texts_that_are_none() -> None:
    assert taken(b"\x93\x01\xc2\x92\xa4Join\xa2\xff\xfe") is None
    assert taken(b"\x93\x01\xc2\x92\xa4\xce\xff\xfe\xfd\xa1x") is None


def test_counts_that_lie() -> None:
    """A length that promises gigabytes takes none."""
    for head in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ):
        for before in (b"", b"\x93\x01\xc2", b"\x93\x01\xc2\x92\xa4Join"):
            assert taken(before + head + b"\xff" * 4) is None


def test_limits() -> None:
    long = "x" * (messages.MAX_NAME + 1)
    offers = {str(n): b"" for n in range(messages.MAX_OFFERS + 1)}
    for body in (
        messages.Join(long),
        messages.Hello(1, 2, long, False, {}),
        messages.Hello(1, 2, "e", False, offers),
        messages.Hello(-1, 2, "e", False, {}),
        messages.Resolve(long, 0, 0, None, False),
    ):
        assert taken(encode(Envelope(1, False, body))) is None

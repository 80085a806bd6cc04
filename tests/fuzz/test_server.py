# SPDX-License-Identifier: Apache-2.0
"""A listening instance, fuzzed: it answers on, and what others have on it stays as it was.

``python -m tests.fuzz.test_server --seconds 600`` goes on for as long as one likes.
"""

from __future__ import annotations

import argparse
import random
import socket
import time
from contextlib import suppress

import msgspec
import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from llm_datadist_torch.transports.local.host import HostIdentity
from tests.fuzz.messages import broken, frames
from tests.peers import Ref, Service, eventually
from tests.wire import GREETING, framed, stranger

pytestmark = pytest.mark.thorough

OFFER = msgspec.msgpack.encode(HostIdentity("elsewhere", 1, 1, 1))
KEEP = BlocksCacheKey(1, 0)


class Target:
    """Instance 1 with a cache, and instance 2 that is linked with it."""

    def __init__(self) -> None:
        self.one, self.two = Service(), Service()
        self.port = self.one.start(1)
        self.one.allocate("kept", 2, 4, 64, paged=True, keys=KEEP)
        self.one.paint("kept", 7)
        self.two.start(2)
        self.two.allocate("room", 2, 4, 64, paged=True)
        assert self.two.link(1, self.port)[0] == "LLM_SUCCESS"

    def check(self) -> None:
        self.two.paint("room", 0)
        assert (
            self.two.attempt("pull_blocks", KEEP, Ref("room"), [0, 1, 2, 3], [0, 1, 2, 3]) is None
        )
        assert self.two.colours("room") == [7]
        assert self.one.colours("kept") == [7]
        assert self.one.link_states().get(2) == "linked"
        with stranger(self.port) as speaker:
            assert isinstance(speaker.request(messages.Unlink()), messages.Refused)

    def finish(self) -> None:
        assert eventually(lambda: not self.one.counters()["grants"])
        self.two.finish()
        self.one.finish()


def speak(rng: random.Random, port: int) -> None:
    """One stranger that knows the protocol, and how to make a link."""
    # It may be turned away at any time.
    with suppress(OSError), stranger(port) as speaker:
        if rng.random() < 0.7:
            hello = messages.Hello(
                rng.randrange(100, 110), 1, rng.choice("abc"), False, {"local": OFFER}
            )
            speaker.send(encode(Envelope(1, False, hello)))
        for _ in range(rng.randrange(40)):
            made = frames(rng)
            # What is asked for in earnest would change the cache, as it may.
            if b"WriteBytes" in made[0]:
                continue
            speaker.send(*made[:2])
            if rng.random() < 0.1:
                speaker.poll(20)


def scribble(rng: random.Random, port: int) -> None:
    """One stranger that knows how a connection begins, and not much more."""
    data = bytearray(GREETING)
    for _ in range(rng.randrange(3)):
        data += framed(broken(rng))
    for _ in range(rng.choice([0, 1, 3, 20])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(data[: rng.randrange(len(data) + 1)])


def fuzz(seed: int, seconds: float, rounds: int) -> int:
    rng, end, done = random.Random(seed), time.monotonic() + seconds, 0
    target = Target()
    try:
        while done < rounds and time.monotonic() < end:
            (speak if rng.random() < 0.5 else scribble)(rng, target.port)
            done += 1
            if done % 10 == 0:
                target.check()
        target.check()
    finally:
        target.finish()
    return done


def test_a_short_while(caplog: pytest.LogCaptureFixture) -> None:
    assert fuzz(1, 30, 60) > 10
    # Strangers are worth a warning; an error is one of ours.
    assert not [record.message for record in caplog.records if record.levelname == "ERROR"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(fuzz(args.seed, args.seconds, 1 << 60), "strangers")

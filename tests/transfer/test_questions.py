# SPDX-License-Identifier: Apache-2.0
"""``request`` and ``on_request``: what programs say to each other over a link."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from llm_datadist_torch import (
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMFeatureNotEnabledError,
    LLMNotLinkedError,
    LLMParamError,
    LLMStatusCode,
    LLMTimeoutError,
)
from llm_datadist_torch.links.questions import MAX_QUESTION_BYTES
from tests.conftest import InstanceFactory

pytestmark = pytest.mark.same_on_every_device


@pytest.fixture
def pair(instance_factory: InstanceFactory) -> tuple[LLMDataDist, LLMDataDist]:
    """Two linked instances; the first has dialed."""
    dialer, owner = instance_factory(timeout_ms=20_000), instance_factory(timeout_ms=20_000)
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = owner.cluster_id
    cluster.append_local_ip_info("127.0.0.1", 0)
    assert owner.listen_address is not None
    cluster.append_remote_ip_info(*owner.listen_address)
    assert dialer.link_clusters([cluster], timeout=20_000)[0] == LLMStatusCode.LLM_SUCCESS
    return dialer, owner


def test_both_sides_ask(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    for asker, answerer in (pair, pair[::-1]):
        answerer.on_request(lambda peer, payload: b"%d:" % peer + payload)
        for payload in (b"", b"what?", bytes(range(256)) * 2048):
            answer = asker.request(answerer.cluster_id, payload)
            assert answer == b"%d:" % asker.cluster_id + payload


def test_what_is_told_comes_in_order_with_what_is_asked(
    pair: tuple[LLMDataDist, LLMDataDist],
) -> None:
    teller, listener = pair
    heard: list[bytes] = []

    def hear(_: int, payload: bytes) -> bytes:
        heard.append(payload)
        if payload == b"1":
            raise ValueError("nobody hears of this")
        return b"also lost"

    listener.on_request(hear)
    for number in range(100):
        teller.send(listener.cluster_id, b"%d" % number)
    assert teller.request(listener.cluster_id, b"last") == b"also lost"
    assert heard == [b"%d" % number for number in range(100)] + [b"last"]
    with pytest.raises(LLMNotLinkedError):
        teller.send(listener.cluster_id + 1, b"")
    with pytest.raises(LLMParamError):
        teller.send(listener.cluster_id, bytes(MAX_QUESTION_BYTES + 1))


def test_questions_of_many_threads_find_their_answers(
    pair: tuple[LLMDataDist, LLMDataDist],
) -> None:
    asker, answerer = pair
    answerer.on_request(lambda peer, payload: payload[::-1])
    wrong = []

    def run(name: bytes) -> None:
        for number in range(50):
            payload = b"%s/%d" % (name, number)
            if asker.request(answerer.cluster_id, payload) != payload[::-1]:
                wrong.append(payload)

    threads = [threading.Thread(target=run, args=(b"%d" % n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_burst_to_a_slow_handler_loses_nothing(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    teller, listener = pair
    heard: list[bytes] = []

    def hear(_: int, payload: bytes) -> bytes:
        time.sleep(0.002)
        heard.append(payload[:4])
        return b""

    listener.on_request(hear)
    for number in range(600):
        teller.send(listener.cluster_id, number.to_bytes(4, "big") + bytes(64 << 10))
    assert teller.request(listener.cluster_id, b"last") == b""
    assert heard == [number.to_bytes(4, "big") for number in range(600)] + [b"last"]
    assert [link.state for link in teller.links()] == ["linked"]


def test_a_handler_may_block_and_use_its_instance(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    """It is not called by the thread that serves the sockets."""
    asker, answerer = pair
    asker.on_request(lambda peer, payload: b"back: " + payload)
    answerer.on_request(lambda peer, payload: answerer.request(peer, payload))
    assert asker.request(answerer.cluster_id, b"x") == b"back: x"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_whatever_a_handler_raises_ends_that_request_alone(
    pair: tuple[LLMDataDist, LLMDataDist], error: type[BaseException]
) -> None:
    asker, answerer = pair

    def handler(peer: int, payload: bytes) -> bytes:
        if payload == b"raise":
            raise error
        return payload

    answerer.on_request(handler)
    with pytest.raises(LLMException, match=f"{error.__name__} at the peer"):
        asker.request(answerer.cluster_id, b"raise")
    assert asker.request(answerer.cluster_id, b"x") == b"x"


def test_a_handler_that_is_set_a_moment_later(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    """Nobody answers *yet*."""
    asker, answerer = pair
    late = threading.Timer(0.3, lambda: answerer.on_request(lambda peer, payload: payload))
    late.start()
    assert asker.request(answerer.cluster_id, b"x") == b"x"
    late.join()


def test_nobody_answers(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    asker, answerer = pair
    with pytest.raises(LLMFeatureNotEnabledError, match="nobody answers"):
        asker.request(answerer.cluster_id, b"x")
    answerer.on_request(lambda peer, payload: b"yes")
    assert asker.request(answerer.cluster_id, b"x") == b"yes"
    answerer.on_request(None)
    with pytest.raises(LLMFeatureNotEnabledError):
        asker.request(answerer.cluster_id, b"x")


def test_a_handler_that_fails_harms_nobody(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    asker, answerer = pair

    def handler(peer: int, payload: bytes) -> bytes:
        if payload == b"typed":
            raise LLMParamError("no such request", status_code=LLMStatusCode.LLM_PARAM_INVALID)
        if payload == b"broken":
            raise KeyError("lost")
        return None if payload == b"none" else bytes(MAX_QUESTION_BYTES + 1)  # type: ignore[return-value]

    answerer.on_request(handler)
    with pytest.raises(LLMParamError, match="no such request"):
        asker.request(answerer.cluster_id, b"typed")
    with pytest.raises(LLMException, match="KeyError at the peer: 'lost'") as caught:
        asker.request(answerer.cluster_id, b"broken")
    assert caught.value.status_code == LLMStatusCode.LLM_FAILED
    with pytest.raises(LLMException, match="TypeError at the peer"):
        asker.request(answerer.cluster_id, b"none")
    with pytest.raises(LLMParamError, match="at most 1048576"):
        asker.request(answerer.cluster_id, b"long")
    answerer.on_request(lambda peer, payload: b"still there")
    assert asker.request(answerer.cluster_id, b"x") == b"still there"


def test_no_answer_in_time(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    asker, answerer = pair
    go_on = threading.Event()

    def handler(peer: int, payload: bytes) -> bytes:
        go_on.wait(60)
        return b"late"

    answerer.on_request(handler)
    try:
        with pytest.raises(LLMTimeoutError):
            asker.request(answerer.cluster_id, b"x", timeout=50)
    finally:
        go_on.set()
    answerer.on_request(lambda peer, payload: b"in time")
    assert asker.request(answerer.cluster_id, b"x") == b"in time"


def test_wrong_arguments(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    asker, answerer = pair
    with pytest.raises(TypeError):
        asker.request(answerer.cluster_id, "text")  # type: ignore[arg-type]
    with pytest.raises(LLMParamError):
        asker.request(answerer.cluster_id, bytes(MAX_QUESTION_BYTES + 1))
    with pytest.raises(LLMNotLinkedError):
        asker.request(answerer.cluster_id + 10**9, b"x")
    with pytest.raises(TypeError):
        asker.on_request(5)  # type: ignore[arg-type]
    asker.finalize()
    for call in (lambda: asker.request(1, b""), lambda: asker.on_request(None)):
        with pytest.raises(RuntimeError):
            call()


def test_the_old_names_warn_and_work(pair: tuple[LLMDataDist, LLMDataDist]) -> None:
    asker, answerer = pair
    with pytest.warns(DeprecationWarning, match="on_request"):
        answerer.on_question(lambda peer, payload: payload[::-1])
    with pytest.warns(DeprecationWarning, match="request"):
        assert asker.ask(answerer.cluster_id, b"abc") == b"cba"
    with pytest.warns(DeprecationWarning, match="send"):
        asker.tell(answerer.cluster_id, b"abc")

# SPDX-License-Identifier: Apache-2.0
"""The example's proxy with "push", before servers that only say what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from examples.vllm.proxy import Ranks, peers_of, ranks_of, servers_of
from tests.vllm.test_proxy import Backend, Setting
from tests.vllm.test_proxy import run as run_proxy

PEERS: list[Ranks] = [[[(1, "h", 70)]], [[(2, "h", 80), (3, "h", 81)]]]


def run(test: Callable[[Setting], Awaitable[None]]) -> None:
    run_proxy(test, PEERS)


async def until(ready: Callable[[], bool]) -> None:
    while not ready():
        await asyncio.sleep(0.01)


def sent_to(backend: Backend) -> list[dict[str, Any]]:
    return [body["kv_transfer_params"] for body in backend.asked]


def names(backend: Backend) -> list[str]:
    return [each["transfer_id"] for each in sent_to(backend)]


def test_both_are_asked_at_the_same_time() -> None:
    async def test(on: Setting) -> None:
        for at in range(2):
            p, d = on.prefill[at], on.decode[at]
            for backend in (p, d):
                backend.answers.clear()
            asking = asyncio.ensure_future(on.post(prompt="x", max_tokens=7, n=2))
            await until(lambda p=p, d=d: bool(p.asked and d.asked))
            (sent,), (wanted,) = sent_to(p), sent_to(d)
            name = wanted["transfer_id"]
            assert wanted == {"do_remote_prefill": True, "transfer_id": name}
            assert sent == {
                "do_remote_decode": True,
                "transfer_id": name,
                "remote_peers": [list(peer) for peer in PEERS[at][0]],
            }
            assert (p.asked[0]["max_tokens"], p.asked[0]["n"]) == (1, 1)
            assert (d.asked[0]["max_tokens"], d.asked[0]["n"]) == (7, 2)
            p.answers.set()
            d.answers.set()
            assert (await asking)[1] == {"from": d.name, "params": wanted}
        assert names(on.decode[0]) != names(on.decode[1])

    run(test)


def test_a_stream_that_has_begun_is_passed_on_whatever_prefill_says() -> None:
    async def test(on: Setting) -> None:
        on.prefill[0].answers.clear()
        url = on.proxy.make_url("/v1/completions")
        async with on.session.post(url, json={"prompt": "x", "stream": True}) as answer:
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert len(on.decode[0].asked) == 1
        await until(lambda: on.prefill[0].cancelled == 1)

    run(test)


@pytest.mark.parametrize("how", ["down", "503"])
def test_a_prefill_server_that_fails_ends_the_pair_and_the_next_gets_a_new_transfer(
    how: str,
) -> None:
    async def test(on: Setting) -> None:
        for backend in on.decode:
            # As one that waits for blocks that don't come.
            backend.answers.clear()
        if how == "down":
            await on.prefill[0].server.close()
        else:
            on.prefill[0].status = 503
            on.prefill[0].answers.clear()
        asking = asyncio.ensure_future(on.post(prompt="x"))
        if how == "503":
            await until(lambda: bool(on.decode[0].asked))
            on.prefill[0].answers.set()
        await until(lambda: bool(on.prefill[1].asked))
        (sent,) = sent_to(on.prefill[1])
        await until(lambda: sent["transfer_id"] in names(on.decode[0]))
        # When nothing listens the first may be over before it has come to the decode server.
        before = len(on.decode[0].asked) - 1
        assert before == 1 or how == "down"
        assert on.decode[0].cancelled == before, "it waits for nothing any more"
        assert len(set(names(on.decode[0]))) == before + 1
        on.decode[0].answers.set()
        assert (await asking)[1]["from"] == "d0"

    run(test)


def test_a_decode_server_that_fails() -> None:
    async def test(on: Setting) -> None:
        on.decode[0].status = 503
        for backend in (on.prefill[0], on.decode[1]):
            backend.answers.clear()
        asking = asyncio.ensure_future(on.post(prompt="x"))
        await until(lambda: len(on.prefill[0].asked) == 2)
        assert on.prefill[0].cancelled == 1, "nobody wants what it computes"
        first, second = sent_to(on.prefill[0])
        assert first["transfer_id"] != second["transfer_id"]
        assert second["remote_peers"] == [list(peer) for peer in PEERS[1][0]]
        for backend in (on.prefill[0], on.decode[1]):
            backend.answers.set()
        assert (await asking)[1]["from"] == "d1"

    run(test)


def test_what_a_prefill_server_refuses_is_passed_on() -> None:
    async def test(on: Setting) -> None:
        on.prefill[0].status = 400
        on.decode[0].answers.clear()
        assert await on.post(prompt="x") == (400, {"error": "p0"})
        await until(lambda: on.decode[0].cancelled == 1)

    run(test)


def test_without_servers_of_one_kind() -> None:
    async def test(on: Setting) -> None:
        for backend in on.prefill:
            await backend.server.close()
        for backend in on.decode:
            backend.answers.clear()
        asking = asyncio.ensure_future(on.post(prompt="x"))
        await until(lambda: any("kv_transfer_params" not in body for body in on.decode[1].asked))
        for backend in on.decode:
            backend.answers.set()
        assert await asking == (200, {"from": "d1", "params": None})
        for backend in on.decode:
            await backend.server.close()
        assert (await on.post(prompt="x"))[0] == 503

    run(test)


def test_ranks_of_a_data_parallel_server_take_turns() -> None:
    """The prefill server is told of the workers of the rank that the decode server will use."""

    async def test(on: Setting) -> None:
        for _ in range(4):
            assert (await on.post(prompt="x"))[0] == 200
        (d, plain), sent = on.decode, [*sent_to(on.prefill[0]), *sent_to(on.prefill[1])]
        assert d.ranks == ["0", "1"]
        assert plain.ranks == [None, None]
        of = {each["transfer_id"]: each["remote_peers"][0][0] for each in sent}
        for name, rank in zip(names(d), d.ranks, strict=True):
            assert of[name] == 1 + int(str(rank))

    run_proxy(test, [[[(1, "h", 70)], [(2, "h", 71)]], [[(3, "h", 80)]]])


def test_peers_as_they_are_told() -> None:
    assert peers_of("77@10.0.0.2:7000,78@fe80::1:7001") == [
        (77, "10.0.0.2", 7000),
        (78, "fe80::1", 7001),
    ]
    two = [[(77, "h", 1)], [(78, "h", 2), (79, "h", 3)]]
    assert ranks_of("77@h:1/78@h:2,79@h:3") == two
    file = '{"prefill": ["p"], "decode": ["d"], "peers": ["77@h:1/78@h:2,79@h:3"]}'
    assert servers_of(file) == (["p"], ["d"], [two])
    for wrong in ("", "77", "77@host", "a@host:1", "77@host:b"):
        with pytest.raises(ValueError, match="invalid literal"):
            peers_of(wrong)

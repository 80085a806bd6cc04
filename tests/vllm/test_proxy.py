# SPDX-License-Identifier: Apache-2.0
"""The example's proxy, before servers that only say what they were asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from examples.vllm.proxy import REST_S, Proxy, Ranks, Servers, servers_of


class Backend:
    """A server of one kind that keeps what it was asked, and fails as it is told."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.asked: list[dict[str, Any]] = []
        self.ranks: list[str | None] = []
        self.status = 200
        self.cut_after = -1
        self.answers = asyncio.Event()
        self.answers.set()
        self.cancelled = 0
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        self.server = TestServer(app)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.status)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [self.name]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.ranks.append(request.headers.get("X-data-parallel-rank"))
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.status != 200:
            return web.json_response({"error": self.name}, status=self.status)
        answer: dict[str, Any] = {"from": self.name}
        if self.kind == "prefill":
            return web.json_response(answer | {"kv_transfer_params": {"of": self.name}})
        answer["params"] = body.get("kv_transfer_params")
        if not body.get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for at in range(3):
            if at == self.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(f"data: {json.dumps(answer | {'at': at})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


class Setting:
    """A proxy before two servers of each kind."""

    def __init__(self) -> None:
        self.prefill = [Backend(f"p{at}", "prefill") for at in range(2)]
        self.decode = [Backend(f"d{at}", "decode") for at in range(2)]
        self.session: aiohttp.ClientSession
        self.proxy: TestServer

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        async with self.session.post(self.proxy.make_url(path), json=body) as answer:
            return answer.status, await answer.json()

    async def health(self) -> tuple[int, dict[str, Any]]:
        async with self.session.get(self.proxy.make_url("/health")) as answer:
            told = await answer.json()
        return answer.status, {kind: list(each.values()) for kind, each in told.items()}


def run(
    test: Callable[[Setting], Awaitable[None]],
    peers: Sequence[Ranks] = (),
    file: Path | None = None,
) -> None:
    async def inside() -> None:
        setting = Setting()
        backends = setting.prefill + setting.decode
        for backend in backends:
            await backend.server.start_server()
        urls = [str(backend.server.make_url("")) for backend in backends]
        setting.proxy = TestServer(Proxy(urls[:2], urls[2:], peers, file).application())
        await setting.proxy.start_server()
        async with aiohttp.ClientSession() as setting.session:
            try:
                await test(setting)
            finally:
                for server in (setting.proxy, *(backend.server for backend in backends)):
                    await server.close()

    asyncio.run(asyncio.wait_for(inside(), 60))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prefill_first_then_decode_with_its_params(path: str) -> None:
    async def test(on: Setting) -> None:
        body = {"prompt": "x", "max_tokens": 7, "max_completion_tokens": 7, "n": 2, "min_tokens": 3}
        status, told = await on.post(path, **body)
        assert (status, told) == (200, {"from": "d0", "params": {"of": "p0"}})
        (asked,) = on.prefill[0].asked
        assert asked == {
            "prompt": "x",
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "n": 1,
            "stream": False,
            "kv_transfer_params": {"do_remote_decode": True},
        }
        assert on.decode[0].asked == [body | {"kv_transfer_params": {"of": "p0"}}]

    run(test)


@pytest.mark.parametrize("peers", [(), [[[(1, "h", 70)]], [[(2, "h", 80)]]]], ids=["pull", "push"])
@pytest.mark.parametrize("waits_for", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes(peers: Sequence[Ranks], waits_for: str, *, stream: bool) -> None:
    """Nothing is computed for it any more, at either side."""

    async def test(on: Setting) -> None:
        waiting = on.prefill[0] if waits_for == "prefill" else on.decode[0]
        waiting.answers.clear()
        asking = asyncio.ensure_future(on.post(prompt="x", stream=stream))
        while not waiting.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
        while not waiting.cancelled:
            await asyncio.sleep(0.01)
        if not peers and waits_for == "prefill":
            assert not on.decode[0].asked
        waiting.answers.set()
        # The server did nothing wrong, and is asked again in its turn.
        assert (await on.post(prompt="y"))[0] == 200
        assert (await on.post(prompt="y"))[0] == 200
        assert len(on.decode[0].asked) + len(on.decode[1].asked) >= 2

    run(test, peers)


def test_servers_take_turns() -> None:
    async def test(on: Setting) -> None:
        told = [(await on.post(prompt=[1, 2]))[1] for _ in range(4)]
        assert [each["from"] for each in told] == ["d0", "d1"] * 2
        assert [each["params"]["of"] for each in told] == ["p0", "p1"] * 2

    run(test)


def test_servers_that_come_and_go(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    file.write_text("{}")

    async def test(on: Setting) -> None:
        urls = [str(each.server.make_url("")) for each in (*on.prefill, *on.decode)]
        on.decode[0].answers.clear()
        drained = asyncio.ensure_future(on.post(prompt="x"))
        while not on.decode[0].asked:
            await asyncio.sleep(0.01)
        file.write_text(json.dumps({"prefill": urls[1:2], "decode": urls[3:]}))
        while len((await on.health())[1]["decode"]) > 1:
            await asyncio.sleep(0.1)
        told = [(await on.post(prompt="x"))[1] for _ in range(3)]
        assert [(each["params"]["of"], each["from"]) for each in told] == [("p1", "d1")] * 3
        on.decode[0].answers.set()
        assert (await drained)[1]["from"] == "d0", "what it had it has ended"

    run(test, file=file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no", "Expecting value"),
        ("[]", "no object"),
        ('{"prefill": []}', "decode"),
        ('{"prefill": [], "decode": ["u"], "peers": ["1@h:1", "2@h:2"]}', "peers of 2 servers"),
    ],
)
def test_files_that_describe_no_servers(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        servers_of(text)


def test_streams_are_passed_on() -> None:
    async def test(on: Setting) -> None:
        url, body = on.proxy.make_url("/v1/completions"), {"prompt": "x", "stream": True}
        async with on.session.post(url, json=body | {"stream_options": {}}) as answer:
            assert answer.content_type == "text/event-stream"
            lines = (await answer.text()).split("\n\n")
        assert [json.loads(line.removeprefix("data: "))["at"] for line in lines[:3]] == [0, 1, 2]
        assert lines[3:] == ["data: [DONE]", ""]
        assert on.prefill[0].asked[0]["stream"] is False
        assert "stream_options" not in on.prefill[0].asked[0]

    run(test)


def test_a_cut_stream_is_cut_for_the_client_too() -> None:
    async def test(on: Setting) -> None:
        on.decode[0].cut_after = 2
        url = on.proxy.make_url("/v1/completions")
        with pytest.raises(aiohttp.ClientError):
            async with on.session.post(url, json={"prompt": "x", "stream": True}) as answer:
                await answer.text()
        assert not on.decode[1].asked, "the client has a part of it already"

    run(test)


@pytest.mark.parametrize("how", ["down", "503"])
def test_the_next_is_tried(how: str) -> None:
    async def test(on: Setting) -> None:
        for backend in (on.prefill[0], on.decode[1]):
            if how == "down":
                await backend.server.close()
            else:
                backend.status = 503
        for _ in range(4):
            status, told = await on.post(prompt="x")
            assert (status, told) == (200, {"from": "d0", "params": {"of": "p1"}})
        if how == "503":
            assert len(on.prefill[0].asked) == 1, "it is left alone for a while"
        assert await on.health() == (200, {"prefill": [False, True], "decode": [True, False]})

    run(test)


def test_without_prefill_servers_decode_does_it_all() -> None:
    async def test(on: Setting) -> None:
        for backend in on.prefill:
            await backend.server.close()
        assert await on.post(prompt="x") == (200, {"from": "d0", "params": None})
        assert (await on.health())[0] == 200

    run(test)


def test_without_decode_servers() -> None:
    async def test(on: Setting) -> None:
        for backend in on.decode:
            await backend.server.close()
        status, told = await on.post(prompt="x")
        assert (status, told["error"]["code"]) == (503, 503)
        assert (await on.health())[0] == 503
        async with on.session.get(on.proxy.make_url("/v1/models")) as answer:
            assert answer.status == 503

    run(test)


def test_what_is_refused_is_passed_on_or_said() -> None:
    async def test(on: Setting) -> None:
        on.prefill[0].status = 400
        assert await on.post(prompt="x") == (400, {"error": "p0"})
        assert not on.prefill[1].asked
        assert not on.decode[0].asked
        for prompts in (["x", "y"], [[1], [2]]):
            status, told = await on.post(prompt=prompts)
            assert (status, told["error"]["type"]) == (400, "BadRequestError")
        assert (await on.post(prompt=["x"]))[1]["params"] == {"of": "p1"}
        assert on.prefill[1].asked[0]["prompt"] == "x"
        url = on.proxy.make_url("/v1/completions")
        for data in (b"{", b"[]"):
            async with on.session.post(url, data=data) as answer:
                assert answer.status == 400
        async with on.session.get(on.proxy.make_url("/v1/models")) as answer:
            assert (await answer.json())["data"] == ["d1"]

    run(test)


def test_those_that_rest_come_last_until_they_have_rested() -> None:
    now = [0.0]
    servers = Servers(["a/", "b", "c"], clock=lambda: now[0])
    servers.failed("b")
    assert [servers.in_turn() for _ in range(3)] == [
        ["a", "c", "b"],
        ["c", "a", "b"],
        ["c", "a", "b"],
    ]
    now[0] = REST_S
    assert servers.in_turn() == ["a", "b", "c"]
    servers.failed("b")
    servers.answered("b")
    assert servers.in_turn() == ["b", "c", "a"]

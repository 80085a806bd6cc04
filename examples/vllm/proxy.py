# SPDX-License-Identifier: Apache-2.0
"""A proxy before prefill and decode servers of vLLM: OpenAI's completions, one prompt per request.

Each request goes to a prefill server with max_tokens=1, and then, with the kv_transfer_params of
its answer, to a decode server, whose answer (also a stream) is passed on. Servers take turns; one
that can't be reached is left alone for a while, and the next is tried. Without any prefill server a
decode server does all of it.

With "push" both get the request at the same time: --peers says for each decode server the
cluster_id, host and port of its workers. A data-parallel one has workers of its own in each rank,
and the proxy chooses the rank, in turn. (With "pull" it need not know of ranks.)

    python examples/vllm/proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
    python examples/vllm/proxy.py ... --peers 77@127.0.0.1:7000
    python examples/vllm/proxy.py ... --peers 77@127.0.0.1:7000/78@127.0.0.1:7001    # two ranks

Servers that come and go are in a file of JSON, which is read again when it has changed: one that
is new gets requests, one that is not there any more gets no new ones, and ends those that it has.

    python examples/vllm/proxy.py --servers servers.json
    {"prefill": ["http://127.0.0.1:8100"], "decode": ["http://127.0.0.1:8200"], "peers": []}
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

logger = logging.getLogger("proxy")

# A server that can't be reached is not tried for so long, unless there is no other.
REST_S = 5.0
HEALTH_S = 2.0
# How soon it is noticed that a client has gone, and that the file of servers has changed.
GONE_S = 0.25
CHANGED_S = 1.0
RANK_HEADER = "X-data-parallel-rank"
PATHS = ("/v1/completions", "/v1/chat/completions")
# Of a request; the prefill server computes one token, and nobody sees it.
NOT_FOR_PREFILL = ("stream_options", "min_tokens", "best_of")

Peer = tuple[int, str, int]
"""Cluster id, host and port of one worker."""

Ranks = list[list[Peer]]
"""The workers of a server, by data-parallel rank."""


class UnreachableError(Exception):
    """A server gave no answer, or one that says that it can't."""


class PrefillFailedError(Exception):
    """The same of a prefill server, while a decode server waits for what it sends."""


class Servers:
    """Servers of one kind, used in turn."""

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._clock = clock
        self._turn = 0
        self._rests_until = dict.fromkeys(self.urls, 0.0)

    def change(self, urls: Sequence[str]) -> None:
        """From now on these."""
        self.urls = [url.rstrip("/") for url in urls]
        self._rests_until = {url: self._rests_until.get(url, 0.0) for url in self.urls}

    def in_turn(self) -> list[str]:
        """All of them, in the order in which a request tries them."""
        start, self._turn = self._turn, self._turn + 1
        turned = [self.urls[(start + at) % len(self.urls)] for at in range(len(self.urls))]
        now = self._clock()
        # Sorting is stable: those that rest come last.
        return sorted(turned, key=lambda url: self._rests_until[url] > now)

    def failed(self, url: str) -> None:
        self._rests(url, self._clock() + REST_S)

    def answered(self, url: str) -> None:
        self._rests(url, 0.0)

    def _rests(self, url: str, until: float) -> None:
        # It may be none of them any more.
        if url in self._rests_until:
            self._rests_until[url] = until


class Proxy:
    """The application's state.

    Args:
        prefill: URLs of prefill servers.
        decode: URLs of decode servers.
        peers: With "push": for each decode server its workers, by data-parallel rank.
        file: Where the servers are written; it is read again when it has changed.
    """

    def __init__(
        self,
        prefill: Sequence[str],
        decode: Sequence[str],
        peers: Sequence[Ranks] = (),
        file: Path | None = None,
    ) -> None:
        self._prefill, self._decode = Servers(prefill), Servers(decode)
        self._peers: dict[str, Ranks] = {}
        self._turns: dict[str, Iterator[int]] = {}
        self._file = file
        self._session: aiohttp.ClientSession | None = None
        self.change(prefill, decode, peers)

    def change(
        self, prefill: Sequence[str], decode: Sequence[str], peers: Sequence[Ranks] = ()
    ) -> None:
        """New requests go to these servers from now on."""
        self._prefill.change(prefill)
        self._decode.change(decode)
        self._peers = dict(zip(self._decode.urls, peers, strict=True)) if peers else {}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        for path in PATHS:
            app.router.add_post(path, self.complete)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.cleanup_ctx.append(self._with_session)
        if self._file is not None:
            app.cleanup_ctx.append(self._with_file)
        return app

    async def _with_file(self, _: web.Application) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(self._watch())
        yield
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        assert self._file is not None
        known = self._file.read_text()
        while True:
            await asyncio.sleep(CHANGED_S)
            try:
                text = self._file.read_text()
                if text != known:
                    known = text
                    self.change(*servers_of(text))
            except (OSError, ValueError) as error:
                logger.warning("%s is not taken over: %s", self._file, error)

    async def _with_session(self, _: web.Application) -> AsyncIterator[None]:
        # Generating takes as long as it takes; only connecting has a limit.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )
        yield
        await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    # -- completions ------------------------------------------------------------------------------

    async def complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            return refused("the body is no JSON")
        if not isinstance(body, dict):
            return refused("the body is no JSON object")
        prompt = body.get("prompt")
        if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt):
            if len(prompt) != 1:
                return refused("send one prompt per request: each has KV of its own")
            body["prompt"] = prompt[0]
        return await self._while_the_client_waits(request, self._answered(request, body))

    async def _answered(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self._peers:
            return await self._pushed(request, body)
        answer, params = await self._prefilled(request.path, body)
        if answer is not None:
            return answer
        if params is not None:
            body["kv_transfer_params"] = params
        return await self._decoded(request, body)

    @staticmethod
    async def _while_the_client_waits(
        request: web.Request, answering: Coroutine[Any, Any, web.StreamResponse]
    ) -> web.StreamResponse:
        """The answer; when the client has gone, both servers' requests are cancelled."""
        task = asyncio.ensure_future(answering)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=GONE_S)
                if request.transport is None or request.transport.is_closing():
                    # vLLM aborts requests whose clients have gone.
                    break
            if not task.done():
                logger.info("a client has gone before its answer was complete")
                return web.Response(status=499)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _prefilled(
        self, path: str, body: dict[str, Any]
    ) -> tuple[web.Response | None, dict[str, Any] | None]:
        """The answer of a prefill server that refuses the request, or the kv_transfer_params."""
        for url in self._prefill.in_turn():
            try:
                status, payload, kind = await self._prefill_at(
                    url, path, body, {"do_remote_decode": True}
                )
                if status != 200:
                    return web.Response(status=status, body=payload, content_type=kind), None
                return None, json.loads(payload).get("kv_transfer_params")
            except (UnreachableError, ValueError) as error:
                self._prefill.failed(url)
                logger.warning("prefill server %s: %s", url, error)
        logger.warning("no prefill server answers, a decode server does it all")
        return None, None

    async def _prefill_at(
        self, url: str, path: str, body: dict[str, Any], params: dict[str, Any]
    ) -> tuple[int, bytes, str]:
        """Status, payload and type of the answer of one prefill server."""
        asked = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
        asked |= {"max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": params}
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        try:
            async with self.session.post(url + path, json=asked) as answer:
                check_status(answer)
                payload = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(str(error)) from error
        self._prefill.answered(url)
        return answer.status, payload, answer.content_type

    async def _decoded(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        for url in self._decode.in_turn():
            try:
                return await self._decode_at(url, request, body, asyncio.Event())
            except UnreachableError as error:
                self._decode.failed(url)
                logger.warning("decode server %s: %s", url, error)
        return error_response(503, "no decode server answers")

    async def _decode_at(
        self,
        url: str,
        request: web.Request,
        body: dict[str, Any],
        begun: asyncio.Event,
        headers: dict[str, str] | None = None,
    ) -> web.StreamResponse:
        """Pass on the answer of one decode server; ``begun``: the client has a part of it."""
        response = None
        try:
            async with self.session.post(url + request.path, json=body, headers=headers) as answer:
                check_status(answer)
                self._decode.answered(url)
                if not body.get("stream") or answer.status != 200:
                    return passed_on(answer, await answer.read())
                async for chunk in answer.content.iter_any():
                    if response is None:
                        begun.set()
                        response = web.StreamResponse(headers={"Content-Type": answer.content_type})
                        await response.prepare(request)
                    await response.write(chunk)
                if response is None:
                    raise UnreachableError("an empty stream")
                await response.write_eof()
                return response
        except (aiohttp.ClientError, OSError) as error:
            if response is None:
                raise UnreachableError(str(error)) from error
            # The client has a part of the answer: it must see that it is not all. A client that is
            # gone itself gets here, too, and is no server's fault.
            logger.warning("a stream from %s was cut: %s", url, error)
            if request.transport is not None:
                request.transport.abort()
            return response

    # -- completions with "push" ------------------------------------------------------------------

    async def _pushed(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Both servers at the same time; a pair of which one fails is given up as a whole."""
        prefill, decode = self._prefill.in_turn(), self._decode.in_turn()
        while prefill and decode:
            try:
                return await self._try_push(prefill[0], decode[0], request, body)
            except PrefillFailedError as error:
                self._prefill.failed(prefill[0])
                logger.warning("prefill server %s: %s", prefill.pop(0), error)
            except UnreachableError as error:
                self._decode.failed(decode[0])
                logger.warning("decode server %s: %s", decode.pop(0), error)
        if not prefill:
            logger.warning("no prefill server answers, a decode server does it all")
        return await self._decoded(request, body)

    async def _try_push(
        self, prefill: str, decode: str, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        ranks = self._peers.get(decode)
        if ranks is None:
            raise UnreachableError("it is none of the servers any more")
        rank = next(self._turns.setdefault(decode, itertools.count())) % len(ranks)
        headers = {RANK_HEADER: str(rank)} if len(ranks) > 1 else None
        # A transfer that was given up is never begun again.
        transfer_id = uuid.uuid4().hex
        sent = {
            "do_remote_decode": True,
            "transfer_id": transfer_id,
            "remote_peers": ranks[rank],
        }
        wanted = {"do_remote_prefill": True, "transfer_id": transfer_id}
        begun = asyncio.Event()
        sending = asyncio.ensure_future(self._prefill_at(prefill, request.path, body, sent))
        decoding = asyncio.ensure_future(
            self._decode_at(decode, request, body | {"kv_transfer_params": wanted}, begun, headers)
        )
        try:
            await asyncio.wait({sending, decoding}, return_when=asyncio.FIRST_COMPLETED)
            # What the decode server has begun by itself, it will end by itself.
            if sending.done() and not decoding.done() and not begun.is_set():
                try:
                    status, payload, kind = sending.result()
                except UnreachableError as error:
                    raise PrefillFailedError(str(error)) from error
                if status != 200:
                    return web.Response(status=status, body=payload, content_type=kind)
            return await decoding
        finally:
            # vLLM aborts requests whose clients have gone, and the connector tells the other side.
            for task in (sending, decoding):
                task.cancel()
            await asyncio.gather(sending, decoding, return_exceptions=True)

    # -- what else there is -----------------------------------------------------------------------

    async def models(self, _: web.Request) -> web.Response:
        for url in self._decode.in_turn():
            try:
                async with self.session.get(url + "/v1/models") as answer:
                    return passed_on(answer, await answer.read())
            except (aiohttp.ClientError, OSError):
                self._decode.failed(url)
        return error_response(503, "no decode server answers")

    async def health(self, _: web.Request) -> web.Response:
        """200 if requests are answered, with what each server says."""
        up = {
            kind: dict(
                zip(
                    servers.urls,
                    await asyncio.gather(*map(self._is_up, servers.urls)),
                    strict=True,
                )
            )
            for kind, servers in (("prefill", self._prefill), ("decode", self._decode))
        }
        return web.json_response(up, status=200 if any(up["decode"].values()) else 503)

    async def _is_up(self, url: str) -> bool:
        timeout = aiohttp.ClientTimeout(total=HEALTH_S)
        try:
            async with self.session.get(url + "/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False


def check_status(answer: aiohttp.ClientResponse) -> None:
    """5xx is this server's fault, and another may do better; anything else is the answer."""
    if answer.status >= 500:
        raise UnreachableError(f"status {answer.status}")


def passed_on(answer: aiohttp.ClientResponse, payload: bytes) -> web.Response:
    return web.Response(status=answer.status, body=payload, content_type=answer.content_type)


def refused(message: str) -> web.Response:
    return error_response(400, message)


def error_response(status: int, message: str) -> web.Response:
    """An error in OpenAI's form."""
    kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
    return web.json_response(
        {"error": {"message": message, "type": kind, "code": status}}, status=status
    )


def servers_of(text: str) -> tuple[list[str], list[str], list[Ranks]]:
    """Prefill servers, decode servers and workers in the JSON of a file.

    Raises:
        ValueError: It is none, or does not say all of it.
    """
    try:
        told = json.loads(text)
        peers = [ranks_of(each) for each in told.get("peers", [])]
        prefill, decode = list(map(str, told["prefill"])), list(map(str, told["decode"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no object with prefill and decode servers: {error!r}") from error
    if peers and len(peers) != len(decode):
        raise ValueError(f"peers of {len(peers)} servers, but {len(decode)} decode servers")
    return prefill, decode, peers


def ranks_of(text: str) -> Ranks:
    """The workers of each rank in ``77@10.0.0.2:7000/78@10.0.0.2:7001``."""
    return [peers_of(each) for each in text.split("/")]


def peers_of(text: str) -> list[Peer]:
    """The workers in ``77@10.0.0.2:7000,78@10.0.0.2:7001``."""
    peers = []
    for each in text.split(","):
        cluster_id, _, address = each.partition("@")
        host, _, port = address.rpartition(":")
        peers.append((int(cluster_id), host, int(port)))
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=Path, metavar="FILE", help="JSON, in place of the others")
    parser.add_argument("--prefill", nargs="+", default=[], metavar="URL")
    parser.add_argument("--decode", nargs="+", default=[], metavar="URL")
    parser.add_argument(
        "--peers",
        nargs="+",
        type=ranks_of,
        default=[],
        metavar="ID@HOST:PORT[,...][/...]",
        help='with "push": the workers of each decode server; "/" separates data-parallel ranks',
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    told = args.prefill, args.decode, args.peers
    if args.servers is not None:
        if any(told):
            parser.error("--servers is in place of --prefill, --decode and --peers")
        told = servers_of(args.servers.read_text())
    elif not args.prefill or not args.decode:
        parser.error("--prefill and --decode are needed, or --servers")
    elif args.peers and len(args.peers) != len(args.decode):
        parser.error(f"{len(args.peers)} --peers for {len(args.decode)} decode servers")
    logging.basicConfig(level=logging.WARNING)
    web.run_app(
        Proxy(*told, file=args.servers).application(),
        host=args.host,
        port=args.port,
        access_log=None,
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Sends prompts to a proxy and to a server without a connector, and compares the texts.

python examples/vllm/compare.py --proxy http://127.0.0.1:8000 --whole http://127.0.0.1:8102
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from typing import Any

import aiohttp

LENGTHS = (33, 128, 129, 300, 511, 900)


async def text_of(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> str:
    async with session.post(url + "/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{url}: status {answer.status}: {await answer.text()}")
        if not body["stream"]:
            return (await answer.json())["choices"][0]["text"]
        text = ""
        async for line in answer.content:
            event = line.decode().strip().removeprefix("data: ")
            if event and event != "[DONE]":
                text += json.loads(event)["choices"][0]["text"]
        return text


async def compare(proxy: str, whole: str, tokens: int, vocabulary: int) -> int:
    """Number of prompts whose texts differ."""
    numbers = random.Random(0)
    bodies = [
        {
            "model": "served",
            "prompt": [numbers.randrange(3, vocabulary) for _ in range(length)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        for length in LENGTHS
        for stream in (False, True)
    ]
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        got = await asyncio.gather(*(text_of(session, proxy, body) for body in bodies))
        # One by one: batches of other sizes may round otherwise.
        right = [await text_of(session, whole, body) for body in bodies]
    for body, mine, other in zip(bodies, got, right, strict=True):
        verdict = "equal" if mine == other else f"DIFFERENT\n  {mine!r}\n  {other!r}"
        kind = "streamed" if body["stream"] else "at once"
        print(f"{len(body['prompt'])} tokens, {kind}: {verdict}")
    return sum(mine != other for mine, other in zip(got, right, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--whole", required=True)
    parser.add_argument("--tokens", type=int, default=16, help="to be generated per prompt")
    parser.add_argument("--vocabulary", type=int, default=1024, help="of the model")
    args = parser.parse_args()
    different = asyncio.run(compare(args.proxy, args.whole, args.tokens, args.vocabulary))
    if different:
        raise SystemExit(f"{different} texts differ")
    print("all texts are equal")


if __name__ == "__main__":
    main()

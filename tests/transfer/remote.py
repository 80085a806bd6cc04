# SPDX-License-Identifier: Apache-2.0
"""What the tests of pulls in remote-accessible mode share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.links.link import Link
from llm_datadist_torch.serving.messages import Call, Note
from tests.peers import Ref, Service

ME, PEER = 1, 2
THEIRS = BlocksCacheKey(PEER, 0)
BLOCKS = [0, 1, 2, 3]
SIZE = (2, 4, 4096)


def pull(here: Service, key: Any = THEIRS) -> Any:
    return here.attempt("pull_blocks", key, Ref("mine"), BLOCKS, BLOCKS)


def status(failure: Any) -> str:
    return "LLM_SUCCESS" if failure is None else failure.status


@contextmanager
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What this process says on its links meanwhile.

    Without the first note of a transport on each link, and the first call of `local`: with its
    first movement an engine connects, and `local` asks for keys to device memory.
    """
    said: list[str] = []
    connecting: set[str] = set()

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(Link, name)

        def call(link: Link, body: Any, *args: Any) -> Any:
            asks_for_keys = isinstance(body, Call) and body.transport == "local"
            if (asks_for_keys or isinstance(body, Note)) and link.name not in connecting:
                connecting.add(link.name)
            else:
                said.append(type(body).__name__)
            return real(link, body, *args)

        return call

    with monkeypatch.context() as patch:
        for name in ("request", "begin", "post"):
            patch.setattr(Link, name, noted(name))
        yield said

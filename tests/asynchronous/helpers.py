# SPDX-License-Identifier: Apache-2.0
"""Synchronizers and byte-exact expectations for the tests of background work."""

from __future__ import annotations

import threading
from typing import Any

from llm_datadist_torch import LayerSynchronizer, LLMStatusCode

PEER = 2
SUCCESS = LLMStatusCode.LLM_SUCCESS
FAILED = LLMStatusCode.LLM_FAILED
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
PI = LLMStatusCode.LLM_PARAM_INVALID
KNE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NYL = LLMStatusCode.LLM_NOT_YET_LINK
UNKNOWN = LLMStatusCode.LLM_UNKNOWN_ERROR
WAIT_MS = 30_000


class Ready(LayerSynchronizer):
    """Says yes, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.asked.append((layer_index, timeout_in_millis))
        return True


class Gate(Ready):
    """Each layer waits for its gate."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gates = [threading.Event() for _ in range(layers)]
        self.entered = [threading.Event() for _ in range(layers)]

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        super().synchronize_layer(layer_index, timeout_in_millis)
        self.entered[layer_index].set()
        assert self.gates[layer_index].wait(60)
        return True

    def open(self) -> None:
        for gate in self.gates:
            gate.set()


class Answers(Ready):
    """Answers what it was told to; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = answers

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        super().synchronize_layer(layer_index, timeout_in_millis)
        answer = self.answers[layer_index]
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Far:
    """The caches of a peer, and what their bytes must be."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.call = process.call
        self.before: dict[str, bytes] = {}
        self.spans: dict[str, Any] = {}

    def make(self, kind: str, name: str, *args: Any, **kwargs: Any) -> int:
        """A cache full of random bytes; returns its id."""
        cache_id = self.call("make", kind, name, *args, **kwargs)
        self.before[name] = self.call("fill", name, len(self.before) + 7)
        self.spans[name] = self.call("span", name)
        return cache_id

    def expect(self, name: str, *patches: tuple[int, int, bytes]) -> None:
        """Exactly these (tensor, offset, bytes) have changed, canaries included."""
        wanted = bytearray(self.before[name])
        for tensor, at, data in patches:
            start = self.spans[name].starts[tensor] + at
            wanted[start : start + len(data)] = data
        assert self.call("dump", name) == bytes(wanted)


class Source:
    """A cache of ours, full of random bytes."""

    def __init__(self, service: Any, name: str, *args: Any, kind: str = "tensors", **kw: Any):
        service.make(kind, name, *args, **kw)
        self.data = service.fill(name, 99)
        self.span = service.span(name)
        self.cache = service.held[name].cache

    def part(self, tensor: int, at: int, nbytes: int) -> bytes:
        start = self.span.starts[tensor] + at
        return self.data[start : start + nbytes]

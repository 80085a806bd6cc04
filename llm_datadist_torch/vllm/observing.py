# SPDX-License-Identifier: Apache-2.0
"""What a worker counts, for vLLM's log and its Prometheus metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from llm_datadist_torch.values.status import LLMException

SECONDS, BYTES = "load_seconds", "load_bytes"
LISTS = (SECONDS, BYTES)
FAILED, EXPIRED, LOST, SENT = "failed_loads", "expired_leases", "lost_leases", "sent_prompts"
FAILED_TOKENS = "failed_load_tokens"
COUNTS = (FAILED, EXPIRED, LOST, SENT, FAILED_TOKENS)
HELP = {
    SECONDS: "Seconds from the start of a load to its end.",
    BYTES: "Bytes of a load.",
    FAILED: "Prompts whose KV could not be loaded.",
    EXPIRED: "Prompts whose blocks were given up because no consumer came, or none in time.",
    LOST: "Queued requests whose producer had given up their blocks.",
    SENT: "Prompts whose blocks consumers have read, or have been given.",
    FAILED_TOKENS: "Tokens that vLLM counted as external hits, and that could not be loaded.",
}


class Record:
    """Counts since the last call of :meth:`take`.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data = empty()
        self.failures: dict[str, int] = {}

    def loaded(self, seconds: float, num_bytes: int) -> None:
        """The KV of a prompt is here."""
        with self._lock:
            self._data[SECONDS].append(seconds)
            self._data[BYTES].append(num_bytes)

    def failed(self, error: BaseException) -> None:
        """The KV of a prompt is not, and why."""
        name = error.status_code.name if isinstance(error, LLMException) else type(error).__name__
        with self._lock:
            self._data[FAILED] += 1
            self.failures[name] = self.failures.get(name, 0) + 1

    def count(self, name: str, number: int) -> None:
        """One of :data:`COUNTS`."""
        if number:
            with self._lock:
                self._data[name] += number

    def take(self) -> dict[str, Any]:
        """All that was counted, as what :func:`merged` and :func:`reduced` take."""
        with self._lock:
            data, self._data = self._data, empty()
        return data


def empty() -> dict[str, Any]:
    """Nothing has been counted."""
    return {name: [] for name in LISTS} | dict.fromkeys(COUNTS, 0)


def is_empty(data: Mapping[str, Any]) -> bool:
    """Whether nothing has been counted."""
    return not any(data.get(name) for name in (*LISTS, *COUNTS))


def merged(data: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What two workers have counted."""
    return {name: data[name] + other[name] for name in (*LISTS, *COUNTS)}


def reduced(data: Mapping[str, Any]) -> dict[str, int | float]:
    """The same in few numbers, for the log."""
    seconds = sorted(data[SECONDS])
    shown: dict[str, int | float] = {"loads": len(seconds)}
    if seconds:
        total = sum(seconds)
        shown["mean load (ms)"] = round(total / len(seconds) * 1e3, 3)
        shown["p90 load (ms)"] = round(seconds[int(0.9 * (len(seconds) - 1))] * 1e3, 3)
        shown["MB per load"] = round(sum(data[BYTES]) / len(seconds) / 2**20, 3)
    return shown | {name.replace("_", " "): data[name] for name in COUNTS}

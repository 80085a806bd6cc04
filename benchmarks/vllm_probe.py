# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN401
"""Connectors that note how long the engine's loop was in each of their hooks, and each pull.

vLLM loads them in its engine processes. A pull is what the engine waits for: from the allocation of
the request's blocks to the report that it has been received. Written as JSON lines, outside of what
is timed, to files that begin with what the environment variable says, one per process.

Of a hook's time by the clock some is the kernel's: the thread could run, and had no processor. That
is in schedstat, and left out of *held*: the CPU time and the waiting, for locks and the GIL, too.
A hook of the name *control* does nothing, in each step of the worker.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector

from benchmarks.schedstat import queued_s
from llm_datadist_torch.vllm.connector import LLMDataDistConnector

VARIABLE = "BENCH_VLLM_PROBE"
# Those of a step or a request; what runs when an engine starts stalls nobody.
HOOKS = (
    "build_connector_meta",
    "get_block_ids_with_load_errors",
    "get_finished",
    "get_num_new_matched_tokens",
    "request_finished",
    "save_kv_layer",
    "start_load_kv",
    "update_connector_output",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
)
CONTROL = "control"
LAST_OF_STEP = ("build_connector_meta", "get_block_ids_with_load_errors")

_started: dict[str, float] = {}
_lines: list[dict[str, Any]] = []


def _note(name: str, args: tuple[Any, ...], start: float) -> None:
    """What the scheduler sees of pulls; and write what there is, once per step."""
    if name == "update_state_after_alloc" and args[2] > 0:
        _started[args[0].request_id] = start
    if name == "update_connector_output":
        now = time.perf_counter()
        _lines.extend(
            {"pull": now - _started.pop(request_id)}
            for request_id in args[0].finished_recving or ()
            if request_id in _started
        )
    if name in LAST_OF_STEP and _lines:
        text = "".join(json.dumps(line) + "\n" for line in _lines)
        _lines.clear()
        # Scheduler and worker are two processes.
        with Path(f"{os.environ[VARIABLE]}.{os.getpid()}").open("a", encoding="utf-8") as file:
            file.write(text)


def _timed(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        queued, start, cpu = queued_s(), time.perf_counter(), time.thread_time()
        result = hook(self, *args, **kwargs)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - start
        held = max(0.0, wall - (queued_s() - queued))
        _lines.append({"hook": name, "s": wall, "held": held, "cpu": cpu})
        _note(name, args, start)
        if name == "start_load_kv":
            _control(self)
        return result

    return timed


def _nothing(_: Any) -> None:
    """What the control does."""


_control = _timed(CONTROL, _nothing)


def _probed(connector: type) -> dict[str, Any]:
    return {
        name: _timed(name, getattr(connector, name)) for name in HOOKS if hasattr(connector, name)
    }


ProbedOurs = type("ProbedOurs", (LLMDataDistConnector,), _probed(LLMDataDistConnector))
ProbedNixl = type("ProbedNixl", (NixlConnector,), _probed(NixlConnector))

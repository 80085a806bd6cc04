# SPDX-License-Identifier: Apache-2.0
"""Engines as tests see them: started together, asked for tokens, killed."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_S = 600
ANSWER_S = 120
ALL_ENGINES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Variables, most of which are read when something is imported."""

# Not imported here: vLLM changes the environment of the process that imports it.
ENGINE_PROCESS = "tests.vllm.engine_process"
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([ENGINE_PROCESS])


def _start_fork_server() -> None:
    """Start the process that engines are forked from, unless it runs."""
    before = dict(os.environ)
    os.environ.update(ALL_ENGINES)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_engine(
    wishes: Connection, arguments: Mapping[str, Any], log: str, environment: Mapping[str, str]
) -> None:
    importlib.import_module(ENGINE_PROCESS).run(wishes, arguments, log, environment)


class Engine:
    """An engine in a process of its own.

    Args:
        model: Directory of its model.
        log: File that it writes its output to.
        connector: ``kv_connector_extra_config``; None for an engine without a connector.
        role: Its ``kv_role``.
        module: Module of the connector; None: it comes as a plugin.
        policy: ``kv_load_failure_policy``.
        in_process: Scheduler and worker in the same process as the ``LLM``.
        bends: Directory of the bent connector.
        environment: Further variables of its environment.
        arguments: Further arguments of ``LLM``.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        connector: dict[str, Any] | None = None,
        role: str = "kv_both",
        module: str | None = None,
        name: str = "LLMDataDistConnector",
        policy: str = "recompute",
        in_process: bool = True,
        bends: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        told = {
            "model": str(model),
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "block_size": 128,
            "dtype": "float32",
            "max_model_len": 2048,
            "disable_log_stats": True,
        }
        told |= arguments
        if connector is not None:
            told["kv_transfer_config"] = {
                "kv_connector": name,
                "kv_role": role,
                # On a busy machine much time may pass before the consumer asks.
                "kv_connector_extra_config": {"claim_s": 120.0} | connector,
                "kv_load_failure_policy": policy,
            } | ({"kv_connector_module_path": module} if module else {})
        self.log = log
        log.touch()
        self._is_ready = False
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
            "BENT_CONNECTOR": str(bends or ""),
            **(environment or {}),
        }
        self._wishes, theirs = _processes.Pipe()
        _start_fork_server()
        self._process = _processes.Process(
            target=_run_engine, args=(theirs, told, str(log), variables)
        )
        self._process.start()
        theirs.close()
        # An engine that nobody closed ends by it, before its end is waited for.
        atexit.register(self._wishes.close)

    @property
    def pid(self) -> int:
        """Of its first process, and of the group that all of its processes are in."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_until_ready(self) -> None:
        if not self._is_ready:
            self._answer(START_S)
            self._is_ready = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        params: Sequence[dict[str, Any] | None] | None = None,
        **sampling: Any,
    ) -> list[dict[str, Any]]:
        """One answer per prompt: tokens, samples (for ``n``), params, finish_reason, cached."""
        self.begin(prompts, max_tokens, params, **sampling)
        return self.finish()

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        params: Sequence[dict[str, Any] | None] | None = None,
        **sampling: Any,
    ) -> None:
        """Ask without waiting; :meth:`finish` gets the answers."""
        each = params or [None] * len(prompts)
        self._say(
            [
                {
                    "prompt": list(prompt),
                    "max_tokens": max_tokens,
                    "params": param,
                    "sampling": sampling,
                }
                for prompt, param in zip(prompts, each, strict=True)
            ]
        )

    def finish(self) -> list[dict[str, Any]]:
        return self._answer(ANSWER_S)

    def abort_at_once(self, prompt: Sequence[int], params: dict[str, Any]) -> None:
        """A request that ends before it has been scheduled; of an engine in its process."""
        self._say({"abort": {"prompt": list(prompt), "params": params}})
        self._answer(ANSWER_S)

    def state(self) -> dict[str, int]:
        """Its ``free_blocks`` and ``preemptions``; of an engine in its process."""
        self._say("state")
        return self._answer(ANSWER_S)

    def reset_prefix_cache(self) -> bool:
        """Forget what was computed, if no request has blocks; whether it was possible."""
        self._say("reset_prefix_cache")
        return self._answer(ANSWER_S)

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the engine."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join(60)

    def text(self) -> str:
        """What it has written to its log."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self._wishes.close()
        self._process.join(30)
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.kill()
        self._process.join(60)

    def _say(self, what: Any) -> None:
        self._wishes.send(what)

    def _answer(self, timeout_s: float) -> Any:
        if not self._wishes.poll(timeout_s):
            raise TimeoutError(f"no answer in {timeout_s} s:\n{self.text()[-6000:]}")
        try:
            return self._wishes.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the engine has died:\n{self.text()[-6000:]}") from None


def make_model(model: Path, *kind: str) -> None:
    """Write a small model; of the example's first kind, or of another."""
    subprocess.run(
        [sys.executable, "examples/vllm/tiny_model.py", str(model), *kind],
        check=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def start_all(engines: Iterable[Engine]) -> None:
    """Wait until all are ready; ``engines`` starts each when it is asked for it.

    The first examines the model's class in a process of its own, and keeps what it finds for the
    others: all at once they would do so for minutes.
    """
    made = iter(engines)
    next(made).wait_until_ready()
    for engine in list(made):
        engine.wait_until_ready()


def close_all(engines: Collection[Engine]) -> None:
    """Close engines, all at once."""
    with ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(Engine.close, engines))

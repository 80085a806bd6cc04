# SPDX-License-Identifier: Apache-2.0
"""Engines as tests see them: started together, asked for tokens, killed."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
START_S = 600
ANSWER_S = 120


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
        mine, theirs = os.pipe()
        with log.open("w") as output:
            self._process = self._start(output, theirs, bends, in_process=in_process)
        os.close(theirs)
        self._answers = os.fdopen(mine)
        self._say(told)

    @staticmethod
    def _start(
        output: IO[str], answers: int, bends: Path | None, *, in_process: bool
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.engine_process", str(answers)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
                "VLLM_HOST_IP": "127.0.0.1",
                "BENT_CONNECTOR": str(bends or ""),
            },
            pass_fds=[answers],
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        self._answer(START_S)

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
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait(60)

    def text(self) -> str:
        """What it has written to its log."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.wait(60)
        self._answers.close()

    def _say(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self, timeout_s: float) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError(f"no answer in {timeout_s} s:\n{self.text()[-6000:]}")
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the engine has died:\n{self.text()[-6000:]}")
        return json.loads(line)


def make_model(model: Path, *kind: str) -> None:
    """Write a small model; of the example's first kind, or of another."""
    subprocess.run(
        [sys.executable, "examples/vllm/tiny_model.py", str(model), *kind],
        check=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def close_all(engines: Collection[Engine]) -> None:
    """Close engines, all at once."""
    with ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(Engine.close, engines))

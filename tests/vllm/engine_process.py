# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, that does what it is told on stdin, line by line.

Run as a program: the first line of stdin is a JSON object of ``LLM`` arguments. Then each line is
a list of requests, or another wish, answered by one line on the descriptor of its argument.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any


def run_requests(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams, TokensPrompt

    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=request["prompt"]) for request in requests],
        [
            SamplingParams(
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                extra_args={"kv_transfer_params": request["params"]} if request["params"] else None,
                **({"temperature": 0.0} | request["sampling"]),
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "samples": [list(each.token_ids) for each in output.outputs],
            "finish_reason": output.outputs[0].finish_reason,
            "params": output.kv_transfer_params,
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def abort_at_once(llm: Any, request: dict[str, Any]) -> None:
    """Of an engine in this process: a request that ends before it has been scheduled."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": request["params"]})
    prompt = TokensPrompt(prompt_token_ids=request["prompt"])
    llm.llm_engine.add_request("aborted", prompt, params)
    llm.llm_engine.abort_request(["aborted"])


def answer(llm: Any, seen: dict[str, Any], told: Any) -> Any:
    if told == "state":
        return shown(seen)
    if told == "reset_prefix_cache":
        return llm.reset_prefix_cache()
    if "abort" in told:
        return abort_at_once(llm, told["abort"])
    return run_requests(llm, told)


def step_in_process(llm: Any) -> None:
    """An engine in this process makes steps only when it is told to."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None and core.scheduler.has_requests():
        llm.llm_engine.step()


def watch(llm: Any) -> dict[str, Any]:
    """What the tests want to know of a scheduler in this process, kept up to date."""
    seen: dict[str, Any] = {"preemptions": 0, "free_blocks": None}
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return seen
    preempt = core.scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> None:
        seen["preemptions"] += 1
        preempt(*args, **kwargs)

    core.scheduler._preempt_request = counted
    pool = core.scheduler.kv_cache_manager.block_pool
    seen["free_blocks"] = pool.get_num_free_blocks
    return seen


def shown(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in seen.items()}


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    arguments = json.loads(sys.stdin.readline())
    from vllm import LLM

    llm = LLM(**arguments)
    seen = watch(llm)
    print(json.dumps({"ready": os.getpid()}), file=answers)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.005)
        except queue.Empty:
            step_in_process(llm)
            continue
        if not line:
            break
        print(json.dumps(answer(llm, seen, json.loads(line))), file=answers)
    # vLLM's own processes end with this one; its exit handlers may take long.
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, that does what it is told.

Such processes are forked from one that has imported this module, and vLLM with it: the import takes
longer than all else that an engine does until it is ready.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt


def run_requests(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def write_output_to(log: str) -> None:
    """Have all that this process and its children print go to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for output in (1, 2):
        os.dup2(file, output)
    os.close(file)


def run(
    wishes: Connection, arguments: Mapping[str, Any], log: str, environment: Mapping[str, str]
) -> None:
    """Be an engine until nobody has wishes any more.

    Args:
        wishes: Where lists of requests, and other wishes, come from, and their answers go to. The
            first thing said there is that the engine is ready.
        arguments: Of ``LLM``.
        log: File of its output.
        environment: Variables that other engines have otherwise.
    """
    os.setsid()
    write_output_to(log)
    os.environ.update(environment)
    llm = LLM(**arguments)
    seen = watch(llm)
    wishes.send({"ready": os.getpid()})
    while True:
        if not wishes.poll(0.005):
            step_in_process(llm)
            continue
        try:
            told = wishes.recv()
        except EOFError:
            break
        wishes.send(answer(llm, seen, told))
    # vLLM's own processes end with this one; its exit handlers may take long.
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)

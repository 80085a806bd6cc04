# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half with "push": which blocks are complete, and which consumers get them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llm_datadist_torch.values.status import LLMParamError
from llm_datadist_torch.vllm.foreign import VllmObject
from llm_datadist_torch.vllm.params import BlockIds, Peer, PushTarget
from llm_datadist_torch.vllm.scheduler.loads import Decision, LoadDeduplicator
from llm_datadist_torch.vllm.scheduler.prompts import KEPT, WANTED, EngineRequest, Prompts
from llm_datadist_torch.vllm.steps import Expect, Push, PushEnd, Step

logger = logging.getLogger("llm_datadist_torch")


class CachedRequests(Protocol):
    """What is used of vLLM's ``CachedRequestData``."""

    req_ids: list[str]
    resumed_req_ids: set[str]
    new_block_ids: list[tuple[list[int], ...] | None]
    num_computed_tokens: list[int]


class NewRequest(Protocol):
    """What is used of vLLM's ``NewRequestData``."""

    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


class SchedulerOutput(Protocol):
    """What is used of vLLM's ``SchedulerOutput``."""

    scheduled_new_reqs: list[NewRequest]
    scheduled_cached_reqs: CachedRequests
    num_scheduled_tokens: dict[str, int]
    preempted_req_ids: Collection[str] | None


@dataclass
class _Sent:
    """A prompt that is being sent while it is computed."""

    target: PushTarget
    prompt: str
    num_tokens: int
    blocks: list[list[int]]
    num_sent: int = 0


class PushScheduler:
    """Plans pushes, and expects those of others.

    Thread safety: none; all methods are called by the engine's loop, and don't block.

    Args:
        prompts: What is known of requests.
        sends: Whether it sends blocks to others.
        receives: Whether it expects blocks.
    """

    def __init__(self, prompts: Prompts, *, sends: bool, receives: bool) -> None:
        self._prompts = prompts
        self._sends = sends
        self._receives = receives
        self._wanted: dict[str, tuple[PushTarget, int]] = {}
        self._sent: dict[str, _Sent] = {}
        self._expecting: dict[str, str] = {}
        self._loads = LoadDeduplicator()
        self._step = Step()

    def set_workers(self, peers: Sequence[Peer], tp_size: int) -> None:
        """Nothing: the clients know where consumers are."""

    def arrived(self, request: EngineRequest) -> None:
        """Nothing: a producer waits until the request has its turn."""

    def lost(self, request_ids: Collection[str]) -> None:
        """Nothing: there are no leases."""

    # -- the consumer -----------------------------------------------------------------------------

    def num_matched(self, request: EngineRequest, num_computed: int) -> int | None:
        """Tokens beyond the first ``num_computed`` that a producer will send.

        None: they come for another request of the same transfer; ask again.
        """
        target = self._target(request, WANTED) if self._receives else None
        if target is None or self._prompts.digest(request) is None:
            return 0
        decision = self._loads.decide(target.transfer_id, request.request_id)
        if decision is not Decision.LOADS:
            return None if decision is Decision.WAITS else 0
        self._wanted[request.request_id] = target, num_computed
        return max(0, self._prompts.num_tokens(request) - num_computed)

    def allocated(self, request: EngineRequest, blocks: BlockIds, num_external: int) -> None:
        """The request has got its blocks."""
        params = request.kv_transfer_params
        if params is not None and params.get(KEPT) and self._sends:
            self._track(request)
        wanted = self._wanted.pop(request.request_id, None)
        if wanted is None or params is None or not params.get(WANTED):
            return
        target, num_computed = wanted
        # Once per request: after a failed transfer, or a preemption, it is computed here.
        params[WANTED] = False
        if not num_external:
            self._loads.loaded([request.request_id])
        else:
            self._expecting[request.request_id] = target.transfer_id
        # vLLM may take fewer tokens than it was offered.
        self._step.expects.append(
            Expect(
                request.request_id,
                target.transfer_id,
                blocks if num_external else (),
                num_computed,
                num_computed + num_external,
                self._prompts.digest(request) or "",
            )
        )

    def loaded(self, request_ids: Collection[str]) -> None:
        """The blocks of these requests have been written, or will not be."""
        self._loads.loaded(request_ids)
        for request_id in request_ids:
            self._expecting.pop(request_id, None)

    # -- the producer -----------------------------------------------------------------------------

    def _track(self, request: EngineRequest) -> None:
        """It has got blocks, also anew after a preemption: then all of it is sent again."""
        target, prompt = self._target(request, KEPT), self._prompts.digest(request)
        if target is not None and target.remote_peers and prompt is not None:
            num_tokens = len(request.prompt_token_ids or ())
            self._sent[request.request_id] = _Sent(target, prompt, num_tokens, [])

    def _advance(self, request_id: str, num_computed: int) -> None:
        sent = self._sent.get(request_id)
        if sent is None or sent.num_sent >= sent.num_tokens:
            return
        num_tokens = min(num_computed, sent.num_tokens)
        self._step.pushes.append(
            Push(
                request_id,
                sent.target.transfer_id,
                sent.target.remote_peers,
                tuple(tuple(blocks) for blocks in sent.blocks),
                sent.num_sent,
                num_tokens,
                sent.prompt,
                # A block that is not full will be written again, unless it is the prompt's last.
                last=num_tokens == sent.num_tokens,
            )
        )
        sent.num_sent = num_tokens

    def finished(
        self,
        request: EngineRequest,
        blocks: BlockIds,  # noqa: ARG002
        *,
        completed: bool,  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; whether its blocks are kept, and what the client is told."""
        self._prompts.forget(request.request_id)
        wanted = self._wanted.pop(request.request_id, None)
        self._loads.loaded([request.request_id])
        given_up = self._expecting.pop(request.request_id, None)
        if given_up is not None:
            # Aborted while the blocks come: the engine frees them when nobody writes any more.
            self._step.expects.append(Expect(request.request_id, given_up, (), 0, 0, ""))
            return False, None
        params = request.kv_transfer_params
        if wanted is not None and params is not None and params.get(WANTED):
            # It ended before it had blocks: the producer need not wait for it.
            transfer_id = wanted[0].transfer_id
            self._step.expects.append(Expect(request.request_id, transfer_id, (), 0, 0, ""))
            return False, None
        sent = self._sent.pop(request.request_id, None)
        # One that ended before it had blocks: the consumer must hear that nothing will come.
        target = sent.target if sent else self._target(request, KEPT) if self._sends else None
        if target is not None and target.remote_peers:
            self._step.push_ends.append(
                PushEnd(
                    request.request_id,
                    target.transfer_id,
                    target.remote_peers,
                    kept=sent is not None,
                )
            )
        return sent is not None, None

    def shorten(self, request: VllmObject, count: int) -> None:
        """See :meth:`Prompts.shorten`."""
        self._prompts.shorten(request, count)

    # -- both -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Nothing is kept for others any more."""
        self._step.reset = True

    def take_step(self, output: SchedulerOutput) -> Step:
        """What the workers are to be told in this step."""
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            if new.req_id in self._sent:
                self._sent[new.req_id].blocks = [list(group) for group in new.block_ids]
                self._advance(new.req_id, new.num_computed_tokens + scheduled[new.req_id])
        cached = output.scheduled_cached_reqs
        for request_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            sent = self._sent.get(request_id)
            if sent is None:
                continue
            if blocks is not None:
                resumed = request_id in cached.resumed_req_ids
                before = [[] for _ in blocks] if resumed or not sent.blocks else sent.blocks
                sent.blocks = [old + list(new) for old, new in zip(before, blocks, strict=True)]
            self._advance(request_id, num_computed + scheduled[request_id])
        step, self._step = self._step, Step()
        preempted = output.preempted_req_ids or ()
        step.preempted = tuple(each for each in preempted if each in self._sent)
        return step

    @staticmethod
    def _target(request: EngineRequest, wish: str) -> PushTarget | None:
        params = request.kv_transfer_params
        if not params or not params.get(wish):
            return None
        try:
            return PushTarget.of(params)
        except LLMParamError as error:
            logger.warning("request %s is not handed over: %s", request.request_id, error)
            params[wish] = False
            return None

# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half with "pull": which blocks are wanted, and which are kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_datadist_torch.values.status import LLMParamError
from llm_datadist_torch.vllm.foreign import VllmObject
from llm_datadist_torch.vllm.params import NULL_BLOCK, BlockIds, Peer, RemoteBlocks
from llm_datadist_torch.vllm.scheduler.loads import Decision, LoadDeduplicator
from llm_datadist_torch.vllm.scheduler.prompts import KEPT, WANTED, EngineRequest, Prompts
from llm_datadist_torch.vllm.steps import Grant, Pull, Renewal, Step

logger = logging.getLogger("llm_datadist_torch")


class PullScheduler:
    """Plans pulls, and keeps blocks for those of others.

    Thread safety: none; all methods are called by the engine's loop, and don't block.

    Args:
        engine_id: This engine's name.
        lease_s: Seconds that a claim keeps a lease of this engine.
        prompts: What is known of requests.
        serves: Whether it keeps blocks for others.
        pulls: Whether it fetches blocks.
    """

    def __init__(
        self,
        engine_id: str,
        lease_s: float,
        prompts: Prompts,
        *,
        serves: bool,
        pulls: bool,
    ) -> None:
        self._engine_id = engine_id
        self._lease_s = lease_s
        self._prompts = prompts
        self._serves = serves
        self._pulls = pulls
        self._peers: tuple[Peer, ...] = ()
        self._tp_size = 1
        self._numbers = itertools.count(1)
        self._remotes: dict[str, RemoteBlocks] = {}
        self._held: set[str] = set()
        self._given_up: set[str] = set()
        self._wanted: dict[str, tuple[RemoteBlocks, int]] = {}
        self._loads = LoadDeduplicator()
        self._step = Step()

    def set_workers(self, peers: Sequence[Peer], tp_size: int) -> None:
        """Where this engine's workers can be reached, stage by stage and by rank."""
        self._peers, self._tp_size = tuple(peers), tp_size

    # -- the consumer -----------------------------------------------------------------------------

    def arrived(self, request: EngineRequest) -> None:
        """A request waits for its turn: the producer must keep its blocks meanwhile."""
        remote = self._remote_of(request)
        if remote is not None and self._loads.is_first(remote.name, request.request_id):
            self._renew(request.request_id, remote)

    def num_matched(self, request: EngineRequest, num_computed: int) -> int | None:
        """Tokens beyond the first ``num_computed`` that a producer has for this request.

        None: another request is loading the same blocks; ask again.
        """
        remote = self._remote_of(request)
        if remote is None:
            return 0
        decision = self._loads.decide(remote.name, request.request_id)
        if decision is not Decision.LOADS:
            return None if decision is Decision.WAITS else 0
        self._wanted[request.request_id] = remote, num_computed
        # It may not get blocks yet.
        self._renew(request.request_id, remote)
        return max(0, self._num_tokens(request, remote) - num_computed)

    def allocated(self, request: EngineRequest, blocks: BlockIds, num_external: int) -> None:
        """The request has got its blocks: plan the pull. Called again later, without effect."""
        wanted = self._wanted.pop(request.request_id, None)
        params = request.kv_transfer_params
        if wanted is None or params is None or not params.get(WANTED):
            return
        remote, num_computed = wanted
        # Once per request: after a failed load, or a preemption, it is computed here.
        params[WANTED] = False
        self._held.discard(request.request_id)
        # What is pulled in the same step need not be claimed before.
        self._step.renewals = [
            renewal for renewal in self._step.renewals if renewal.request_id != request.request_id
        ]
        if not num_external:
            self._loads.loaded([request.request_id])
            self._release(request.request_id, remote)
            return
        # vLLM may take fewer tokens than it was offered.
        self._step.pulls.append(
            Pull(request.request_id, remote, blocks, num_computed, num_computed + num_external)
        )

    def loaded(self, request_ids: Iterable[str]) -> None:
        """The workers have loaded the blocks of these requests, or could not."""
        self._loads.loaded(request_ids)

    def lost(self, request_ids: Iterable[str]) -> None:
        """The producers of these queued requests have given up their blocks."""
        for request_id in request_ids:
            remote = self._remotes.get(request_id)
            if remote is None or request_id not in self._held:
                continue
            logger.warning(
                "request %s is computed here: engine %s has given up its blocks while it waited",
                request_id,
                remote.remote_engine_id,
            )
            del self._remotes[request_id]
            self._given_up.add(request_id)
            self._held.discard(request_id)
            self._wanted.pop(request_id, None)
            self._loads.loaded([request_id])

    def _renew(self, request_id: str, remote: RemoteBlocks) -> None:
        if request_id not in self._held:
            self._held.add(request_id)
            self._step.renewals.append(Renewal(request_id, remote))

    def _remote_of(self, request: EngineRequest) -> RemoteBlocks | None:
        params = request.kv_transfer_params
        if not self._pulls or not params or not params.get(WANTED):
            return None
        known = self._remotes.get(request.request_id)
        if known is not None:
            return known
        given_up = request.request_id in self._given_up
        remote = None if given_up else self._checked(request, params)
        if remote is None:
            params[WANTED] = False
        else:
            self._remotes[request.request_id] = remote
        return remote

    def _checked(self, request: EngineRequest, params: Mapping[str, Any]) -> RemoteBlocks | None:
        try:
            remote = RemoteBlocks.of(params)
        except LLMParamError as error:
            logger.warning("request %s is computed here: %s", request.request_id, error)
            return None
        if remote.prompt == self._prompts.digest(request):
            return remote
        logger.warning(
            "request %s is computed here: request %s of engine %s had another prompt",
            request.request_id,
            remote.remote_request_id,
            remote.remote_engine_id,
        )
        self._release(request.request_id, remote)
        return None

    def _num_tokens(self, request: EngineRequest, remote: RemoteBlocks) -> int:
        return min(remote.remote_num_tokens, self._prompts.num_tokens(request))

    def _release(self, request_id: str, remote: RemoteBlocks) -> None:
        self._step.pulls.append(Pull(request_id, remote, awaited=False))

    # -- the producer -----------------------------------------------------------------------------

    def finished(
        self, request: EngineRequest, blocks: BlockIds, *, completed: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended.

        Args:
            request: Which.
            blocks: Its blocks.
            completed: It ended by itself: it was not aborted.

        Returns:
            Whether its blocks are kept until the workers say otherwise, and what the client is
            told.
        """
        try:
            return self._finished(request, blocks, completed=completed)
        finally:
            self._remotes.pop(request.request_id, None)
            self._given_up.discard(request.request_id)
            self._prompts.forget(request.request_id)

    def _finished(
        self, request: EngineRequest, blocks: BlockIds, *, completed: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        self._wanted.pop(request.request_id, None)
        if request.request_id in self._held:
            self._held.discard(request.request_id)
            self._step.drops.append(request.request_id)
        params = request.kv_transfer_params
        remote = self._remote_of(request)
        is_first = remote is not None and self._loads.is_first(remote.name, request.request_id)
        self._loads.loaded([request.request_id])
        if remote is not None and params:
            params[WANTED] = False
            if is_first:
                # It ended before it had blocks: nobody else would release those of the producer.
                self._release(request.request_id, remote)
            return False, None
        if not params or not self._serves or not params.get(KEPT) or not completed:
            return False, None
        prompt = self._prompts.digest(request)
        if (
            not self._peers
            or not prompt
            or not any(block != NULL_BLOCK for group in blocks for block in group)
        ):
            return False, None
        number = next(self._numbers)
        self._step.grants.append(Grant(number, request.request_id, blocks))
        return True, RemoteBlocks(
            remote_engine_id=self._engine_id,
            remote_request_id=request.request_id,
            remote_lease=number,
            remote_lease_s=self._lease_s,
            remote_peers=self._peers,
            remote_tp_size=self._tp_size,
            remote_block_ids=blocks,
            remote_num_tokens=request.num_computed_tokens,
            prompt=prompt,
        ).to_params()

    def shorten(self, request: VllmObject, count: int) -> None:
        """See :meth:`Prompts.shorten`."""
        self._prompts.shorten(request, count)

    # -- both -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Nothing is kept for others any more."""
        self._step.reset = True

    def take_step(self, output: object = None) -> Step:  # noqa: ARG002
        """What the workers are to be told in this step."""
        step, self._step = self._step, Step()
        return step

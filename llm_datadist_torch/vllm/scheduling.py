# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector: which blocks are wanted, and which are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, Protocol

from llm_datadist_torch.values.status import LLMParamError
from llm_datadist_torch.vllm.leases import lease_number_now
from llm_datadist_torch.vllm.params import Peer, RemoteBlocks, prompt_digest
from llm_datadist_torch.vllm.siblings import Siblings, Turn
from llm_datadist_torch.vllm.steps import Grant, Pull, Step

logger = logging.getLogger("llm_datadist_torch")

WANTED = "do_remote_prefill"
KEPT = "do_remote_decode"


class EngineRequest(Protocol):
    """What is used of vLLM's ``Request``."""

    request_id: str
    prompt_token_ids: Sequence[int] | None
    num_computed_tokens: int
    kv_transfer_params: MutableMapping[str, Any] | None
    mm_features: Sequence[Any]
    lora_request: Any


def digest_of_prompt(request: EngineRequest) -> str | None:
    """Digest of what the KV of a prompt depends on; None for a prompt of embeddings."""
    if request.prompt_token_ids is None:
        return None
    further = [str(feature.identifier) for feature in request.mm_features or ()]
    if request.lora_request is not None:
        further.append(str(request.lora_request.lora_name))
    return prompt_digest(request.prompt_token_ids, further)


class PullScheduler:
    """Plans pulls, and keeps blocks for those of others.

    Thread safety: none; all methods are called by the engine's loop, and don't block.

    Args:
        engine_id: This engine's name.
        serves: Whether it keeps blocks for others.
        pulls: Whether it fetches blocks.
    """

    def __init__(self, engine_id: str, *, serves: bool, pulls: bool) -> None:
        self._engine_id = engine_id
        self._serves = serves
        self._pulls = pulls
        self._peers: tuple[Peer, ...] = ()
        self._digest = ""
        self._last_lease = 0
        self._wanted: dict[str, RemoteBlocks] = {}
        self._siblings = Siblings()
        self._step = Step()

    def set_workers(self, peers: Sequence[Peer], digest: str) -> None:
        """Where this engine's workers can be reached, by rank, and the digest of what they have."""
        self._peers, self._digest = tuple(peers), digest

    # -- the consumer -----------------------------------------------------------------------------

    def num_matched(self, request: EngineRequest, num_computed: int) -> int | None:
        """Tokens beyond the first ``num_computed`` that a producer has for this request.

        None: another request is loading the same blocks; ask again.
        """
        remote = self._remote_of(request)
        if remote is None:
            return 0
        turn = self._siblings.turn(_name_of(remote), request.request_id)
        if turn is not Turn.LOADS:
            return None if turn is Turn.WAITS else 0
        self._wanted[request.request_id] = remote
        return max(0, self._num_tokens(request, remote) - num_computed)

    def allocated(self, request: EngineRequest, blocks: Sequence[int], num_external: int) -> None:
        """The request has got its blocks: plan the pull. Called again later, without effect."""
        remote = self._wanted.pop(request.request_id, None)
        params = request.kv_transfer_params
        if remote is None or params is None or not params.get(WANTED):
            return
        # Once per request: after a failed load, or a preemption, it is computed here.
        params[WANTED] = False
        if not num_external:
            self._siblings.loaded([request.request_id])
            self._release(request.request_id, remote)
            return
        num_tokens = self._num_tokens(request, remote)
        self._step.pulls.append(
            Pull(
                request.request_id,
                remote,
                tuple(blocks),
                num_tokens - num_external,
                num_tokens,
            )
        )

    def loaded(self, request_ids: Iterable[str]) -> None:
        """The workers have loaded the blocks of these requests, or could not."""
        self._siblings.loaded(request_ids)

    def _remote_of(self, request: EngineRequest) -> RemoteBlocks | None:
        params = request.kv_transfer_params
        if not self._pulls or not params or not params.get(WANTED):
            return None
        try:
            remote = RemoteBlocks.of(params)
        except LLMParamError as error:
            logger.warning("request %s is computed here: %s", request.request_id, error)
            params[WANTED] = False
            return None
        if remote.prompt != digest_of_prompt(request):
            logger.warning(
                "request %s is computed here: request %s of engine %s had another prompt",
                request.request_id,
                remote.remote_request_id,
                remote.remote_engine_id,
            )
            params[WANTED] = False
            self._release(request.request_id, remote)
            return None
        return remote

    @staticmethod
    def _num_tokens(request: EngineRequest, remote: RemoteBlocks) -> int:
        return min(remote.remote_num_tokens, len(request.prompt_token_ids or ()))

    def _release(self, request_id: str, remote: RemoteBlocks) -> None:
        self._step.pulls.append(Pull(request_id, remote, awaited=False))

    # -- the producer -----------------------------------------------------------------------------

    def finished(
        self, request: EngineRequest, blocks: Sequence[int], *, completed: bool
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
        self._wanted.pop(request.request_id, None)
        self._siblings.loaded([request.request_id])
        params = request.kv_transfer_params
        if not params:
            return False, None
        remote = self._remote_of(request)
        if remote is not None:
            params[WANTED] = False
            if self._siblings.is_first(_name_of(remote), request.request_id):
                # It ended before it had blocks: nobody else would release those of the producer.
                self._release(request.request_id, remote)
            return False, None
        prompt = digest_of_prompt(request)
        if not (self._serves and params.get(KEPT) and completed and blocks and prompt):
            return False, None
        number = self._last_lease = max(self._last_lease + 1, lease_number_now())
        self._step.grants.append(Grant(number, request.request_id, tuple(blocks)))
        return True, RemoteBlocks(
            remote_engine_id=self._engine_id,
            remote_request_id=request.request_id,
            remote_lease=number,
            remote_peers=self._peers,
            remote_block_ids=tuple(blocks),
            remote_num_tokens=request.num_computed_tokens,
            prompt=prompt,
            digest=self._digest,
        ).to_params()

    # -- both -------------------------------------------------------------------------------------

    def take_step(self, output: object = None) -> Step:  # noqa: ARG002
        """What the workers are to be told in this step."""
        step, self._step = self._step, Step()
        return step


def _name_of(remote: RemoteBlocks) -> tuple[str, int]:
    """The same for all requests that name the same blocks."""
    return remote.remote_engine_id, remote.remote_lease

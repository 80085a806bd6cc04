# SPDX-License-Identifier: Apache-2.0
"""What is known of a request, once and for all."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Protocol

from llm_datadist_torch.vllm.foreign import VllmObject
from llm_datadist_torch.vllm.params import prompt_digest

WANTED = "do_remote_prefill"
KEPT = "do_remote_decode"
SHORTENED = "llm_datadist_shortened"
"""Set in a producer's request whose last tokens have been taken away."""


class EngineRequest(Protocol):
    """What is used of vLLM's ``Request``."""

    request_id: str
    prompt_token_ids: Sequence[int] | None
    num_computed_tokens: int
    kv_transfer_params: MutableMapping[str, Any] | None
    mm_features: Sequence[Any]
    lora_request: Any


AdapterDigest = Callable[[VllmObject], str]
"""What names an adapter: of its name and its content."""


def name_of_adapter(lora_request: VllmObject) -> str:
    """The name alone, where the content can't be looked at."""
    return str(lora_request.lora_name)


class Prompts:
    """Digests of prompts, computed once per request.

    Thread safety: none; all methods are called by the engine's loop.

    Args:
        adapter: What names an adapter.
        back_off: Tokens at the end of a prompt that a consumer always computes itself.
    """

    def __init__(self, adapter: AdapterDigest = name_of_adapter, back_off: int = 0) -> None:
        self._adapter = adapter
        self._back_off = back_off
        self._digests: dict[str, str | None] = {}

    def digest(self, request: EngineRequest) -> str | None:
        """Digest of what the KV of a prompt depends on; None for a prompt of embeddings."""
        if request.request_id not in self._digests:
            self._digests[request.request_id] = self._digest(request)
        return self._digests[request.request_id]

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._digests.pop(request_id, None)

    def shorten(self, request: VllmObject, count: int) -> None:
        """Take the last tokens of a producer's prompt away, which its consumer computes itself.

        For a state that can't be taken back: the producer's must be the one before those tokens.
        """
        params = request.kv_transfer_params
        wanted = params and params.get(KEPT) and not params.get(SHORTENED)
        if not wanted or request.prompt_token_ids is None or request.num_prompt_tokens <= count:
            return
        # The digest is of the whole prompt, as the consumer has it.
        self.digest(request)
        del request.prompt_token_ids[-count:]
        del request._all_token_ids[-count:]  # noqa: SLF001
        request.num_prompt_tokens -= count
        request.max_tokens = 1
        params[SHORTENED] = True

    def num_tokens(self, request: EngineRequest) -> int:
        """Tokens of a consumer's prompt that a producer can have."""
        return max(0, len(request.prompt_token_ids or ()) - self._back_off)

    def _digest(self, request: EngineRequest) -> str | None:
        if request.prompt_token_ids is None:
            return None
        # A picture's tokens are placeholders, equal for all pictures of a size.
        further = [str(feature.identifier) for feature in request.mm_features or ()]
        if request.lora_request is not None:
            further.append(self._adapter(request.lora_request))
        return prompt_digest(request.prompt_token_ids, further)

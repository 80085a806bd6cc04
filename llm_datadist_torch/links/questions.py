# SPDX-License-Identifier: Apache-2.0
"""Questions that the users of two linked instances ask each other, about whatever they like."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for

MAX_QUESTION_BYTES = 1 << 20
"""Of a question, and of an answer."""

QuestionHandler: TypeAlias = Callable[[int, bytes], bytes]


class Questions:
    """Who answers the questions of peers.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._handler: QuestionHandler | None = None

    def set_handler(self, handler: QuestionHandler | None) -> None:
        """Have this one answer from now on; None for nobody."""
        self._handler = handler

    def answer(self, peer: int, payload: bytes) -> bytes:
        """What the user answers.

        Raises:
            LLMFeatureNotEnabledError: Nobody answers here.
            LLMException: What the handler raises, or its answer is none.
        """
        handler = self._handler
        if handler is None:
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                "nobody answers questions here",
                remedy="the peer's program calls on_question().",
            )
        return check_payload("the answer", handler(peer, payload))


def check_payload(name: str, payload: bytes) -> bytes:
    """Check what is to be sent.

    Raises:
        TypeError: No bytes.
        LLMParamError: Too many.
    """
    check_isinstance(name, payload, bytes, allow_none=False)
    if len(payload) > MAX_QUESTION_BYTES:
        raise param_error(
            f"{name} has {len(payload)} bytes, at most {MAX_QUESTION_BYTES} are possible",
            remedy="bytes of caches are for pulls and pushes.",
        )
    return payload

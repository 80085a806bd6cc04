# SPDX-License-Identifier: Apache-2.0
"""What HIXL's status codes mean here."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

SUCCESS = 0
PARAM_INVALID = 103900
TIMEOUT = 103901
NOT_CONNECTED = 103902
ALREADY_CONNECTED = 103903
FAILED = 503900
RESOURCE_EXHAUSTED = 203900


class _Meaning(NamedTuple):
    name: str
    status: LLMStatusCode


# HIXL code -> its name, and the status that the reference has for it (reference API, 11.6).
_MEANINGS = {
    SUCCESS: _Meaning("SUCCESS", LLMStatusCode.LLM_SUCCESS),
    PARAM_INVALID: _Meaning("PARAM_INVALID", LLMStatusCode.LLM_PARAM_INVALID),
    TIMEOUT: _Meaning("TIMEOUT", LLMStatusCode.LLM_TIMEOUT),
    NOT_CONNECTED: _Meaning("NOT_CONNECTED", LLMStatusCode.LLM_NOT_YET_LINK),
    ALREADY_CONNECTED: _Meaning("ALREADY_CONNECTED", LLMStatusCode.LLM_ALREADY_LINK),
    103904: _Meaning("NOTIFY_FAILED", LLMStatusCode.LLM_FAILED),
    103905: _Meaning("UNSUPPORTED", LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
    FAILED: _Meaning("FAILED", LLMStatusCode.LLM_FAILED),
    RESOURCE_EXHAUSTED: _Meaning("RESOURCE_EXHAUSTED", LLMStatusCode.LLM_FAILED),
}


def meaning_of(code: int) -> tuple[str, LLMStatusCode]:
    """Name and status of a HIXL code; unknown codes are LLM_FAILED."""
    return _MEANINGS.get(code, _Meaning("unknown", LLMStatusCode.LLM_FAILED))


def hixl_error(code: int, doing: str, *, remedy: str | None = None) -> LLMException:
    """The error for a HIXL call that did not succeed.

    Args:
        code: What the call returned.
        doing: What was tried, for the message: "connect to 10.0.0.1:26000".
        remedy: What to do about it; None takes the status table's remedy.
    """
    name, status = meaning_of(code)
    return error_for(status, f"HIXL could not {doing}: {name} ({code})", remedy=remedy)

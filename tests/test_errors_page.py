# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md is what the table of status codes says, and the table what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_datadist_torch.values.status import LLMStatusCode
from scripts import make_errors_page

PACKAGE = Path(__file__).resolve().parent.parent / "llm_datadist_torch"

# What a runtime below reports, and what is raised as a class instead of by its code.
FROM_BELOW = {"LLM_SUSPECT_REMOTE_ERROR"}
BY_CLASS = {"LLM_OUT_OF_MEMORY", "LLM_KV_CACHE_NOT_EXIST", "LLM_PARAM_INVALID"}


def named_in_the_code() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("status.py", "status_codes.py"):
            found |= set(re.findall(r"LLMStatusCode\.(LLM_\w+)", path.read_text(encoding="utf-8")))
    return found


def test_the_page_is_current():
    assert make_errors_page.PAGE.read_text(encoding="utf-8") == make_errors_page.page(), (
        "run python scripts/make_errors_page.py"
    )


@pytest.mark.parametrize("code", list(LLMStatusCode))
def test_what_the_library_returns_has_causes(code: LLMStatusCode):
    returned = code.name in named_in_the_code() | FROM_BELOW | BY_CLASS
    assert bool(code.causes) == (returned and code != LLMStatusCode.LLM_SUCCESS)

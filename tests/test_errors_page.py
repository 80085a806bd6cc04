# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md, in both languages, is what the table says, and the table what the code does."""

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


@pytest.mark.parametrize("path", list(make_errors_page.pages()), ids=lambda path: path.parent.name)
def test_the_page_is_current(path: Path):
    assert path.read_text(encoding="utf-8") == make_errors_page.pages()[path], (
        "run python scripts/make_errors_page.py"
    )


def test_every_text_is_translated_and_no_other():
    in_the_table = {
        text
        for code in LLMStatusCode
        if code != LLMStatusCode.LLM_SUCCESS
        for text in (code.meaning, *code.causes, *(code.remedy for _ in code.causes if code.remedy))
    }
    extra = {code.remedy for code in LLMStatusCode} | in_the_table
    assert in_the_table <= set(make_errors_page.errors_zh.TEXTS) <= extra


@pytest.mark.parametrize("code", list(LLMStatusCode))
def test_what_the_library_returns_has_causes(code: LLMStatusCode):
    returned = code.name in named_in_the_code() | FROM_BELOW | BY_CLASS
    assert bool(code.causes) == (returned and code != LLMStatusCode.LLM_SUCCESS)

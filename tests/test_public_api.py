# SPDX-License-Identifier: Apache-2.0
"""The public API is what tests/public_api.txt says."""

from __future__ import annotations

import difflib

from tests import public_api


def test_the_public_api_is_as_written():
    written = public_api.FILE.read_text(encoding="utf-8")
    changes = difflib.unified_diff(
        written.splitlines(), public_api.text().splitlines(), "public_api.txt", "now", lineterm=""
    )
    told = "\n".join(changes)
    assert not told, f"{told}\nIf this is meant: python -m tests.public_api, and review the change"


def test_it_says_the_signatures_and_defaults():
    """A look at the file itself: it would be no use if it lost these."""
    lines = public_api.FILE.read_text(encoding="utf-8").splitlines()
    for wanted in (
        "class CacheManager",
        "    unregister_cache(self, cache_id: int, *, timeout: int | None = None) -> None",
        "    block(self, index: int) -> tuple[torch.Tensor, ...]",
        "    LLM_SUCCESS = 0",
        "    tensor_addrs: list[int]",
        "    link_retry_count = 1 (settable)",
    ):
        assert wanted in lines
    assert "## llm_datadist.v2.llm_types" in lines

# SPDX-License-Identifier: Apache-2.0
"""docs/support.md and both READMEs say what the runs of `make test-versions` found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from scripts import make_support_table

pytestmark = pytest.mark.same_on_every_device

RAN: dict[str, Any] = {
    "row": "new",
    "python": "3.11",
    "versions": {"torch": "2.11.0+cu128", "numpy": "2.4.6"},
    "machine": "x86_64",
    "glibc": "2.36",
    "wheel": "a.whl",
    "sha256": "ab",
    "runs": {"cpu": {"status": 0, "passed": 7}},
}
MISSING = {
    "row": "none",
    "wanted": {"python": "3.11", "torch": "2.13.0", "torch_npu": "", "numpy": "", "nixl": "9.9"},
    "error": "no such version",
}


def other(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(RAN) | changed


def made(*results: dict[str, Any]) -> dict[str, str]:
    return {path.name: text for path, text in make_support_table.parts(list(results)).items()}


@pytest.mark.parametrize("path", list(make_support_table.pages()), ids=lambda path: path.name)
def test_the_page_is_current(path: Path):
    assert path.read_text(encoding="utf-8") == make_support_table.pages()[path], (
        "run python scripts/make_support_table.py"
    )


def test_a_row_that_failed_is_shown_and_not_claimed():
    failed = {
        "cpu": {"status": 1, "passed": 6, "failed": 1, "failures": ["tests/test_a.py::test_b"]}
    }
    pages = made(RAN, other(versions={"torch": "2.9.1"}, runs=failed))
    assert "| 3.11 | 2.9.1 |" in pages["support.md"]
    assert "6 passed, **1 failed**" in pages["support.md"]
    assert "tests/test_a.py::test_b" in pages["support.md"]
    assert pages["README.md"] == "torch 2.11.0; Python 3.11"


def test_versions_are_sorted_by_number():
    passed = {"status": 0, "passed": 7}
    both = {"cpu": passed, "simulated npu": passed}
    old = other(versions={"torch": "2.9.1", "torch_npu": "2.9.0"}, runs=both)
    pages = made(RAN, old)
    assert pages["support.md"].index("2.9.1") < pages["support.md"].index("2.11.0+cu128")
    assert pages["README.md"].startswith("torch 2.9.1 and 2.11.0; ")
    assert pages["README.md"].endswith("; torch_npu 2.9.0 on the simulated Ascend runtime")
    assert "2.9.1 和 2.11.0" in pages["README.zh.md"]


def test_a_run_that_did_not_start_is_not_claimed():
    runs = {"cpu": {"status": 0, "passed": 7}, "simulated npu": {"status": 4}}
    pages = made(other(versions={"torch": "2.9.1", "torch_npu": "2.9.0"}, runs=runs))
    assert "| 7 passed | **did not start** (status 4) |" in pages["support.md"]
    assert pages["README.md"] == "torch 2.9.1; Python 3.11"


def test_what_could_not_be_installed_is_said():
    page = made(RAN, MISSING)["support.md"]
    assert "- Python 3.11 with torch 2.13.0, nixl 9.9: `no such version`." in page


def test_all_rows_are_of_one_wheel():
    with pytest.raises(SystemExit, match="2 wheels"):
        made(RAN, other(sha256="cd"))

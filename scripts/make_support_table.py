# SPDX-License-Identifier: Apache-2.0
"""Writes what scripts/test_versions.py has measured into its part of docs/support.md.

`--check` only compares. The part lies between the lines START and END; the rest of the page stays.

python scripts/make_support_table.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions"
PAGE = ROOT / "docs" / "support.md"
START, END = "<!-- what was run: start -->", "<!-- what was run: end -->"

HEAD = """
Made by `scripts/make_support_table.py` of `benchmarks/results/versions/*.json`, which
`make test-versions` writes. Each row is an environment of its own, in which the wheel was put
and the core suite run (the tests that `scripts/versions.toml` names, of the sdist), with the source
tree out of the way. "Simulated NPU" is torch_npu on the simulated Ascend runtime of this
repository.

"""
TAIL = """
Not run:

- Other versions of Python than those above. The wheel uses CPython's limited API of 3.10, which
  later versions keep; abi3audit confirms that it uses nothing else.
- aarch64, but for `scripts/test_aarch64.sh`, which runs the copies in host memory and the arena
  under qemu-user, and the import of the wheel's libraries by a CPython 3.11 for aarch64 there.
- Another glibc than {glibc}. The wheel needs 2.28 or later; auditwheel confirms that.
- nixl 1.5.2: the package exists, nixl-cu12 and nixl-cu13 1.5.2, which it needs, do not.
- A real NPU, and CANN.
"""


def cell(run: dict[str, Any] | None) -> str:
    """The result of one run of the suite."""
    if run is None:
        return "—"
    failed = run.get("failed", 0) + run.get("error", 0)
    text = f"{run.get('passed', 0)} passed"
    if failed:
        text += f", **{failed} failed**"
    elif run["status"]:
        text += f", **ended with status {run['status']}**"
    if run.get("skipped"):
        text += f", {run['skipped']} skipped"
    return text


def table(results: list[dict[str, Any]]) -> str:
    """The part of the page that is made."""
    lines = [
        "| Python | torch | torch_npu | NumPy | NIXL | on the CPU | on a simulated NPU |",
        "|" + "---|" * 7,
    ]
    for result in results:
        versions = result["versions"]
        names = ("torch", "torch_npu", "numpy", "nixl-cu12")
        cells = [result["python"], *(versions.get(name, "—") for name in names)]
        runs = result["runs"]
        cells += [cell(runs["cpu"]), cell(runs.get("simulated npu"))]
        lines.append(f"| {' | '.join(cells)} |")
    wheels = sorted({f"`{result['wheel']}`, sha256 `{result['sha256']}`" for result in results})
    machines = sorted({f"{result['machine']}, glibc {result['glibc']}" for result in results})
    lines += [
        "",
        f"The wheel of all rows: {'; '.join(wheels)}.",
        f"The machine: {'; '.join(machines)}.",
    ]
    oldest = min(result["glibc"] for result in results)
    return HEAD + "\n".join(lines) + "\n" + TAIL.format(glibc=oldest)


def page(old: str, made: str) -> str:
    """The page with its made part replaced."""
    before, start, rest = old.partition(START)
    _, end, tail = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{PAGE} has no lines {START} and {END}")
    return before + start + made + end + tail


def main() -> int:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        raise SystemExit(f"no results in {RESULTS}: make test-versions")
    results.sort(key=lambda result: (result["versions"]["torch"], result["row"]))
    old = PAGE.read_text(encoding="utf-8")
    text = page(old, table(results))
    if check and old != text:
        print(f"{PAGE.name} is not what the results say: python scripts/make_support_table.py")
        return 1
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Writes what scripts/test_versions.py has measured into docs/support.md and both READMEs.

`--check` only compares. The made parts lie between START and END; the rest of a page stays.

python scripts/make_support_table.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions"
PLAN = ROOT / "scripts" / "versions.toml"
START, END = "<!-- what was run: start -->", "<!-- what was run: end -->"
PACKAGES = ("torch", "torch_npu", "numpy", "nixl-cu12")
Result = dict[str, Any]

HEAD = """
Made by `scripts/make_support_table.py` of `benchmarks/results/versions/*.json`, which
`make test-versions` writes. Each row is an environment of its own, in which the wheel was put
and the core suite run, with the source tree out of the way. A torch that is a CUDA build (`+cu`)
ran without a GPU, over empty libraries in CUDA's place. "Simulated NPU" is torch_npu on the
simulated Ascend runtime of this repository.

"""
SUITE = """
The core suite, from the sdist that the wheel was built of, is a selection: the whole suite runs
with torch 2.13.0 on Python 3.11 from the source tree.

"""
NOT_RUN = """
Not run:

"""
NEVER_RUN = """\
- Other versions of Python than those above. The wheel uses CPython's limited API of 3.10, which
  later versions keep; abi3audit confirms that it uses nothing else.
- aarch64, but for `scripts/test_aarch64.sh`, which runs the copies in host memory and the arena
  under qemu-user, and the import of the wheel's libraries by a CPython 3.11 for aarch64 there.
- Another glibc than {glibc}. The wheel needs 2.28 or later; auditwheel confirms that.
- torch_npu 2.14.0 on an x86-64 machine: a process that loads it beside a CUDA build of torch 2.14.1
  aborts, since both register the allocator's setting `pinned_reserve_segment_size_mb` ("Duplicated
  key"), and another build of that torch was not found.
- NIXL beside a CUDA build of torch over empty libraries: one run, with torch 2.15.0, ended in
  SIGSEGV while a test of NIXL ran; that test passed alone. What crashed was not found.
- A real NPU, and CANN.
"""
# What was found out about tests that failed.
REMARKS = {
    "tests/test_ops.py::test_the_gil_is_released": " (it reached its limit of 100 s, while other"
    " programs kept both cores busy)",
}
# What the READMEs say.
ENGLISH = ("torch {}", "Python {}", "torch_npu {} on the simulated Ascend runtime")
CHINESE = ("torch {}", "Python {}", "模拟 Ascend 运行时上的 torch_npu {}")


def cell(run: dict[str, Any] | None) -> str:
    """The result of one run of the suite."""
    if run is None:
        return "—"
    if "passed" not in run:
        return f"**did not start** (status {run['status']})"
    failed = run.get("failed", 0) + run.get("error", 0)
    text = f"{run['passed']} passed"
    if failed:
        text += f", **{failed} failed**"
    elif run["status"]:
        text += f", **ended with status {run['status']}**"
    if run.get("skipped"):
        text += f", {run['skipped']} skipped"
    return text


def table(results: list[Result]) -> list[str]:
    """What ran: a line per row."""
    lines = [
        "| Python | torch | torch_npu | NumPy | NIXL | on the CPU | on a simulated NPU |",
        "|" + "---|" * 7,
    ]
    for result in results:
        cells = [result["python"], *(result["versions"].get(name, "—") for name in PACKAGES)]
        runs = result["runs"]
        cells += [cell(runs["cpu"]), cell(runs.get("simulated npu"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def failures(results: list[Result]) -> list[str]:
    """What failed, by name."""
    lines = [
        f"- torch {result['versions']['torch']}, {where}: `{test}`{REMARKS.get(test, '')}"
        for result in results
        for where, run in result["runs"].items()
        for test in run.get("failures", ())
    ]
    return ["", "What failed:", "", *lines] if lines else []


def suite() -> list[str]:
    """What the core suite is, per file."""
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    lines = ["| where | tests | what they cover |", "|" + "---|" * 3]
    for where, key in (("CPU", "cpu_tests"), ("simulated NPU", "npu_tests")):
        lines += [f"| {where} | `{file}` | {covered} |" for file, covered in plan[key].items()]
    return lines


def versions_of(row: dict[str, str]) -> str:
    """What a row of versions.toml asks for."""
    names = ("torch", "torch_npu", "numpy", "nixl")
    versions = ", ".join(f"{name} {row[name]}" for name in names if row.get(name))
    return f"Python {row['python']} with {versions}"


def not_run(results: list[Result]) -> list[str]:
    """The items of the page for rows that could not be installed or imported, or not run yet."""
    refused = [
        f"- {versions_of(result['wanted'])}: `{result['error']}`."
        for result in results
        if "error" in result
    ]
    known = {result["row"] for result in results}
    planned = tomllib.loads(PLAN.read_text(encoding="utf-8"))["row"]
    missing = [row for row in planned if row["name"] not in known]
    return refused + [f"- {versions_of(row)}: not yet." for row in missing]


def support_part(ran: list[Result], missing: list[str]) -> str:
    """The part of docs/support.md that is made."""
    wheels = {f"`{result['wheel']}`, sha256 `{result['sha256']}`" for result in ran}
    if len(wheels) != 1:
        raise SystemExit(f"the rows are of {len(wheels)} wheels; run all with one: {wheels}")
    machines = sorted({f"{result['machine']}, glibc {result['glibc']}" for result in ran})
    lines = [
        *table(ran),
        "",
        f"The wheel of all rows: {wheels.pop()}.",
        f"The machine: {'; '.join(machines)}.",
        *failures(ran),
    ]
    oldest = min(result["glibc"] for result in ran)
    parts = [HEAD, "\n".join(lines), "\n", SUITE, "\n".join(suite()), "\n", NOT_RUN]
    parts += [f"{item}\n" for item in missing]
    return "".join([*parts, NEVER_RUN.format(glibc=oldest)])


def listed(versions: list[str], word: str) -> str:
    """One text of several versions, oldest first."""
    ordered = sorted(set(versions), key=numbers)
    return f" {word} ".join(filter(None, [", ".join(ordered[:-1]), ordered[-1]]))


def numbers(version: str) -> list[int]:
    """What a version such as 2.10.0+cu128 is sorted by."""
    return [int(part) for part in version.partition("+")[0].split(".") if part.isdigit()]


def claim(ran: list[Result], words: tuple[str, ...], conjunction: str, separator: str) -> str:
    """What a README says: the versions whose tests all passed, on the CPU or a simulated NPU."""
    cpu, npu = (
        [result for result in ran if result["runs"].get(where, {"status": 1})["status"] == 0]
        for where in ("cpu", "simulated npu")
    )
    versions = (
        [result["versions"]["torch"].partition("+")[0] for result in cpu],
        [result["python"] for result in cpu],
        [result["versions"]["torch_npu"] for result in npu],
    )
    return separator.join(
        text.format(listed(found, conjunction))
        for text, found in zip(words, versions, strict=True)
        if found
    )


def parts(results: list[Result]) -> dict[Path, str]:
    """The made part of each page."""
    ran = [result for result in results if "runs" in result]
    ran.sort(key=lambda result: (numbers(result["versions"]["torch"]), result["row"]))
    return {
        ROOT / "docs" / "support.md": support_part(ran, not_run(results)),
        ROOT / "README.md": claim(ran, ENGLISH, "and", "; "),
        ROOT / "README.zh.md": claim(ran, CHINESE, "和", ";"),
    }


def with_part(path: Path, made: str) -> str:
    """A page with its made part replaced."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, tail = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{path} has no {START} and {END}")
    return before + start + made + end + tail


def pages() -> dict[Path, str]:
    """Each page as it must be."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        raise SystemExit(f"no results in {RESULTS}: make test-versions")
    return {path: with_part(path, made) for path, made in parts(results).items()}


def main() -> int:
    """Write the pages, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"{stale} are not what the results say: python scripts/make_support_table.py")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Makes docs/benchmarks.md and docs/scaling.md of the JSON in benchmarks/results alone.

    python -m benchmarks.page           # write them
    python -m benchmarks.page --check   # fail if they are not those of the JSON

No figure on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, plots, scaling
from benchmarks.text import machine, number, size_text, table, time_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
SCALING = ROOT / "docs" / "scaling.md"
IMAGES = ROOT / "docs" / "images"

FILES = ("bench.json", "hosts.json", "latency.json")
"""Of the command: `make bench` writes the first, and further benchmarks may be in the others."""
TEMPLATE = Path(__file__).with_name("page_template.md")
NOTHING = "**No run is committed.** `make bench` measures, on a machine that does nothing else."
WORDS = {
    "block_bytes": "block",
    "tensor_bytes": "tensor",
    "messages_per_link": "messages for a link",
    "hidden_share": "hidden share",
    "instance_kib": "memory of an instance, KiB",
    "dialed_kib": "memory of a link, KiB",
    "accepted_kib": "memory of a link at the other side, KiB",
    "dialed_fds": "descriptors of a link",
    "accepted_fds": "descriptors of a link at the other side",
}


def parts(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each contender of ours."""
    names = {each["name"]: None for p in points for each in p["contenders"] if is_ours(each)}
    for name in names:
        yield f"\n**{name}**\n\n" + table(*rows_of(name, points))
    if any("further" in point for point in points):
        yield "\n" + further(points)


def is_ours(contender: Mapping[str, Any]) -> bool:
    return bool(contender["role"] == "ours")


def rows_of(name: str, points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one contender of ours, with its baselines and its ceiling."""
    mine = [
        (point, {each["name"]: each for each in point["contenders"]})
        for point in points
        if any(each["name"] == name for each in point["contenders"])
    ]
    ours = [contenders[name] for _, contenders in mine]
    others = [*dict.fromkeys(other for each in ours for other in each["baselines"])]
    others += [*dict.fromkeys(each["ceiling"] for each in ours if each["ceiling"])]
    others = [each for each in others if any(each in found for _, found in mine)]
    moves = any("gb_per_s" in each for each in ours)
    head = [WORDS.get(axis, axis) for axis in mine[0][0]["at"]]
    head += ["p50", "p99", *(["GB/s"] if moves else []), "each", *(["CPU s/GB"] if moves else [])]
    head += ["peak"]
    ceilings = {each["ceiling"] for each in ours}
    for other in others:
        head.append(f"{'ceiling' if other in ceilings else 'baseline'}: {other}")
        head.append("ratio")
    return head, [row_of(name, point, found, others, moves) for point, found in mine]


def row_of(
    name: str,
    point: Mapping[str, Any],
    contenders: Mapping[str, Mapping[str, Any]],
    others: Sequence[str],
    moves: bool,
) -> list[str]:
    each = contenders[name]
    row = [*place_of(point), time_text(each["p50_us"]), time_text(each["p99_us"])]
    row += [number(each["gb_per_s"])] if moves else []
    row += [time_text(each["us_per_unit"]) if "us_per_unit" in each else ""]
    row += [number(each["cpu_s_per_gb"])] if moves else []
    row += [size_text(each["peak_bytes"])]
    for other in others:
        found = contenders.get(other)
        if found is None:
            row += ["failed" if other in point.get("failed", ()) else "", ""]
            continue
        shown = f"{number(found['gb_per_s'])} GB/s" if moves else time_text(found["p50_us"])
        row += [shown, f"**{number(found['p50_us'] / each['p50_us'])}**"]
    return row


def place_of(point: Mapping[str, Any]) -> list[str]:
    """Where in its sweep a point is."""
    return [shown_at(axis, value) for axis, value in point["at"].items()]


def shown_at(axis: str, value: float | str) -> str:
    """One number of a place in a sweep."""
    return size_text(float(value)) if axis.endswith("_bytes") else str(value)


def further(points: Sequence[Mapping[str, Any]]) -> str:
    """What else was found of each point."""
    kept = [point for point in points if point.get("further")]
    names = list(dict.fromkeys(name for point in kept for name in point["further"]))
    head = [WORDS.get(name, name) for name in (*kept[0]["at"], *names)]
    rows = [[*place_of(point), *(number(point["further"].get(n)) for n in names)] for point in kept]
    return table(head, rows)


def vllm_part(record: Mapping[str, Any] | None) -> str:
    """Engines of vLLM, of what ``benchmarks.bench_vllm`` has written."""
    if record is None:
        return NOTHING.replace("`make bench` measures", "That measures")
    rows = [row for row in record["results"] if "row" in row]
    theirs = {row["row"]: row["added"] for row in rows if "Nixl" in row["connector"]}
    shown = [
        [
            row["row"],
            row["connector"].removeprefix("Probed"),
            str(row["count"]),
            *(number(row[name]) for name in ("fetched", "cached", "added")),
            " to ".join(number(value) for value in row["quartiles"]),
            number(row["cpu"]),
            number(row["requests_per_s"]) if "requests_per_s" in row else "",
            ""
            if "Nixl" in row["connector"]
            else f"**{number(row['added'] / theirs[row['row']])}**",
        ]
        for row in rows
    ]
    head = ("tokens", "connector", "n", "first token, ms", "KV there, ms", "added, ms")
    head += ("(quartiles)", "CPU, ms", "requests per second", "added, ours / NIXL's")
    return f"{machine(record['environment'])}\n{loads_text(record)}\n{table(head, shown)}"


def loads_text(record: Mapping[str, Any]) -> str:
    """What else the machine did while engines of vLLM were measured."""
    loads = record["environment"]["loads"]
    told = ", ".join(
        f"{each['connector'].removeprefix('Probed')} {number(each['before'])} to"
        f" {number(each['after'])}"
        for each in loads
    )
    return f"Load before and after each start of engines, their own included: {told}.\n"


def goals_part(results: goals.Results) -> str:
    """Each goal beside what was measured, and whether it is met."""
    head = (
        "operation",
        "against",
        "goal",
        "measured, worst first",
        "worst at",
        "met",
        "why it is missed",
    )
    return table(head, [goal_row(goal, goal.measured(results)) for goal in goals.all_goals()])


def goal_row(goal: goals.Goal, found: goals.Found) -> list[str]:
    """A row of the table of goals."""
    asked = [goal.operation, goal.against, goal.text]
    if not found:
        return [*asked, "", "", "not measured", ""]
    figures = sorted(found, key=lambda each: each[1], reverse=goal.least is None)
    (place, worst), (_, best) = figures[0], figures[-1]
    shown = [number(worst), number(best)]
    text = " to ".join(dict.fromkeys(shown)) + (f" {goal.unit}" if goal.unit else "")
    count = sum(goal.met(figure) for _, figure in found)
    met = "**met**" if count == len(found) else f"missed at {len(found) - count} of {len(found)}"
    where = ", ".join(f"{WORDS.get(axis, axis)} {shown_at(axis, place[axis])}" for axis in place)
    return [*asked, text, where, met, "" if count == len(found) else goal.reason]


def load(name: str) -> dict[str, Any] | None:
    """A file of results; None if there is none.

    Raises:
        SystemExit: It is of a run that only tried whether it works.
    """
    path = RESULTS / name
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("tiny"):
        raise SystemExit(f"{path} is of a run with --tiny, which has no figures")
    return record


def load_all() -> dict[str, Any] | None:
    """All results of the command: of each benchmark the newest that is in one of FILES.

    Returns:
        A record as the command writes one, of the run with the most benchmarks; "apart" has the
        environments of benchmarks that are of other runs. None if there is no file.
    """
    records = [record for name in FILES if (record := load(name)) is not None]
    records.sort(key=lambda record: str(record["environment"]["time"]))
    if not records:
        return None
    # The largest run is the page's.
    main = max(records, key=lambda record: len(record["benchmarks"]))
    found = main | {"benchmarks": {}, "left_out": {}, "apart": {}}
    for record in records:
        found["left_out"] |= record["left_out"]
        for name, points in record["benchmarks"].items():
            found["benchmarks"][name] = points
            found["apart"][name] = record["environment"]
            found["left_out"].pop(name, None)
    apart = found["apart"].items()
    found["apart"] = {name: where for name, where in apart if where is not main["environment"]}
    for name, why in found["left_out"].items():
        there = [each for each, points in found["benchmarks"].items() if name in names_in(points)]
        found["left_out"][name] = why + (f" (it is in {', '.join(there)})" if there else "")
    return found


def names_in(points: Sequence[Mapping[str, Any]]) -> set[str]:
    """The contenders of all points."""
    return {each["name"] for point in points for each in point["contenders"]}


def text_of(record: Mapping[str, Any] | None, vllm: Mapping[str, Any] | None) -> str:
    """The page: the template, with what the results give in the place of each {{name}}."""
    given = record or {"benchmarks": {}, "left_out": {}}
    results = given["benchmarks"] | {"vllm": (vllm or {"results": []})["results"]}

    def part(found: re.Match[str]) -> str:
        name = found[1]
        if name == "machine":
            return machine(record["environment"]).strip() if record else NOTHING
        if name == "goals":
            return goals_part(results).strip()
        if name == "vllm":
            return vllm_part(vllm).strip()
        if name == "left_out":
            return "\n".join(f"- {peer}: {why}" for peer, why in given["left_out"].items())
        if name not in given["benchmarks"]:
            return "Not in the committed run."
        points = given["benchmarks"][name]
        picture = f"![{name}](images/bench_{name}.svg)\n" if name in plots.AXES else ""
        where = given.get("apart", {}).get(name)
        run = "" if where is None else f"Measured apart from the others:\n\n{machine(where)}\n"
        return (run + picture + "".join(parts(points))).strip()

    text = re.sub(r"\{\{(\w+)\}\}", part, TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def pictures(record: Mapping[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names of the pictures of benchmarks, and what is drawn in each."""
    for name, points in (record or {"benchmarks": {}})["benchmarks"].items():
        if name in plots.AXES:
            yield f"bench_{name}.svg", {name: points}


def wrong_pictures(record: Mapping[str, Any] | None) -> Iterator[str]:
    """Pictures that are not of these results."""
    for name, results in pictures(record):
        path = IMAGES / name
        told = [plots.digest(points) for points in results.values()]
        if not path.exists() or any(each not in path.read_text(encoding="utf-8") for each in told):
            yield str(path.relative_to(ROOT))


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, help="another file, with --out")
    parser.add_argument("--out", type=Path, help="folder for a page of it, without pictures")
    options = parser.parse_args(arguments)
    if options.results and options.out:
        record = json.loads(options.results.read_text(encoding="utf-8"))
        (options.out / PAGE.name).write_text(text_of(record, None), encoding="utf-8")
        return 0
    record, vllm = load_all(), load("vllm.json")
    growth = {name: load(f"{name}.json") for name in scaling.FILES}
    texts = {PAGE: text_of(record, vllm), SCALING: scaling.text_of(growth)}
    if options.check:
        wrong = [*wrong_pictures(record), *scaling.wrong_picture(growth, IMAGES)]
        for path, text in texts.items():
            if path.read_text(encoding="utf-8") != text:
                wrong.append(str(path.relative_to(ROOT)))
        for name in wrong:
            print(f"{name} is not what the results give: python -m benchmarks.page")
        return bool(wrong)
    for name, results in pictures(record):
        plots.draw(results, IMAGES / name)
    scaling.draw(growth, IMAGES)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

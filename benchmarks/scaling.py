# SPDX-License-Identifier: Apache-2.0
"""Makes docs/scaling.md and its picture of what growth and simulate_cluster have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.text import machine, number, size_text, table, time_text

FILES = ("growth", "cluster", "vllm_scheduler")
"""Files of results, without .json."""
TEMPLATE = Path(__file__).with_name("scaling_template.md")
PICTURE = "growth.svg"
NOTHING = "**Not measured.** `make bench-scale` measures, on a machine that does nothing else."

Records = Mapping[str, Mapping[str, Any] | None]
Points = Sequence[Mapping[str, Any]]


def text_of(records: Records) -> str:
    """The page: the template, with what the results give in the place of each {{name}}."""

    def part(found: re.Match[str]) -> str:
        name = found[1]
        growth = records.get("growth")
        if name == "machine":
            return measured(growth).strip() if growth else NOTHING
        if name in ("arithmetic", "simulated", "costs"):
            cluster = records.get("cluster")
            return CLUSTER[name](cluster).strip() if cluster else NOTHING
        if name == "scheduler":
            record = records.get("vllm_scheduler")
            return scheduler(record).strip() if record else NOTHING
        points = (growth or {"results": {}})["results"].get(name)
        return TABLES[name](points).strip() if points else NOTHING

    text = re.sub(r"\{\{(\w+)\}\}", part, TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def measured(growth: Mapping[str, Any]) -> str:
    """Where, and each axis when; what is beside it on the machine differs between runs."""
    rows = [
        [axis, each["commit"], each["time"], number(each["load_before"])]
        for axis, each in growth["axes"].items()
    ]
    axes = table(("axis", "commit", "when", "load before"), rows)
    return f"{machine(growth['environment'])}\n{axes}"


# -- tables ----------------------------------------------------------------------------------------


def contender(point: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A contender of a point; None if it isn't there."""
    return next((each for each in point["contenders"] if each["name"] == name), None)


def pulls(points: Points, axis: str) -> str:
    """Pulls that grow."""
    head = [axis]
    names = [each["name"] for each in points[0]["contenders"]]
    for name in names:
        head += [f"{name}: p50", "p99", "each", *(["peak"] if name == "allocated" else [])]
    rows = []
    for point in points:
        row = [f"{point['at'][axis]:,}"]
        for name in names:
            each = contender(point, name)
            assert each is not None
            row += [time_text(each["p50_us"]), time_text(each["p99_us"])]
            row += [time_text(each["us_per_unit"])]
            row += [size_text(each["peak_bytes"])] if name == "allocated" else []
        rows.append(row)
    return table(head, rows)


def peers(points: Points) -> str:
    """Links, and what they cost while nothing happens."""
    head = ["links", "cold", "warm", "each, warm", "idle: messages/s", "idle: CPU of a core"]
    head += ["pull, two-sided: p50", "p99", "CPU here", "CPU at the owner"]
    rows = [
        [
            str(each["links"]),
            time_text(each["cold_ms"] * 1e3),
            time_text(each["warm_ms"] * 1e3),
            time_text(each["warm_ms"] * 1e3 / each["links"]),
            number(each["idle_messages_per_s"]),
            f"{number(max(0.0, each['idle_cpu_percent']))} %",
            *(time_text(each[f"pull_{name}_us"]) for name in ("p50", "p99", "cpu", "owner_cpu")),
        ]
        for each in points
    ]
    return table(head, rows)


def weight(points: Points) -> str:
    """What a link takes."""
    last = points[-1]
    rows = [
        [
            "memory of a link",
            f"{number(last['dialed_kib'])} KiB",
            f"{number(last['accepted_kib'])} KiB",
        ],
        ["descriptors of a link", number(last["dialed_fds"]), number(last["accepted_fds"])],
        ["messages to make a link, both directions", number(last["messages_per_setup"]), ""],
        ["messages of a two-sided pull, both directions", number(last["pull_messages"]), ""],
        ["memory of an instance", f"{number(last['instance_kib'])} KiB", ""],
    ]
    return table(("", "at the side that dialed", "at the other side"), rows)


def caches(points: Points) -> str:
    """Caches of one owner."""
    head = ["caches", "allocate: p50", "p99", "memory of each", "descriptors of the process"]
    head += ["known pull: p50", "p99", "first pull: p50", "p99"]
    rows = [
        [
            f"{each['caches']:,}",
            *(time_text(each["allocate"][name]) for name in ("p50_us", "p99_us")),
            size_text(max(0.0, each["bytes_per_cache"])),
            str(each["descriptors"]),
            *(time_text(each["known"][name]) for name in ("p50_us", "p99_us")),
            *(time_text(each["first"][name]) for name in ("p50_us", "p99_us")),
        ]
        for each in points
    ]
    return table(head, rows)


def processes(points: Points) -> str:
    """Processes that pull from one owner."""
    head = ["processes", "128 KiB: p50", "p99", "pulls/s together", "16 MiB: p50", "p99"]
    head += ["GB/s together"]
    rows = [
        [
            str(each["processes"]),
            *(time_text(each["small"][name]) for name in ("p50_us", "p99_us")),
            number(each["small"]["pulls_per_s"]),
            *(time_text(each["big"][name]) for name in ("p50_us", "p99_us")),
            number(each["big"]["gb_per_s"]),
        ]
        for each in points
    ]
    return table(head, rows)


def catalog(points: Points) -> str:
    """The catalog's tables."""
    head = ["caches", "keys", "memory of a key", "add a key", "find by key", "find by id"]
    head += ["find by address", "remove a key"]
    names = ("add_us_per_key", "find_by_key_us", "find_by_id_us", "find_by_address_us")
    rows = [
        [
            f"{each['caches']:,}",
            f"{each['keys']:,}",
            f"{number(each['bytes_per_key'])} B",
            *(time_text(each[name]) for name in (*names, "remove_key_us")),
        ]
        for each in points
    ]
    return table(head, rows)


TABLES = {
    "blocks": lambda points: pulls(points, "blocks"),
    "tensors": lambda points: pulls(points, "tensors"),
    "peers": lambda points: f"{peers(points)}\n{weight(points)}",
    "caches": caches,
    "processes": processes,
    "catalog": catalog,
}


def sizes(record: Mapping[str, Any]) -> list[str]:
    """How the simulated deployments are called."""
    return [f"{each['prefill']:,} x {each['decode']:,}" for each in record["results"]]


def arithmetic(record: Mapping[str, Any]) -> str:
    """What of a deployment is arithmetic."""
    kinds = (
        ("links", "links", lambda value: f"{value:,}"),
        ("memory of a prefill instance", "prefill_mib", lambda value: size_text(value * 2**20)),
        ("memory of a decode instance", "decode_mib", lambda value: size_text(value * 2**20)),
        ("descriptors of a prefill instance", "prefill_fds", number),
        ("descriptors of a decode instance", "decode_fds", number),
        ("messages to make all links", "setup_messages", number),
        ("messages of pulls per second", "pull_messages_per_s", number),
    )
    rows = [[text, *(show(each[name]) for each in record["results"])] for text, name, show in kinds]
    return table(("", *sizes(record)), rows)


def simulated(record: Mapping[str, Any]) -> str:
    """What is simulated."""
    kinds = (
        ("all links made, when all decode instances start at once", "setup_s", 1e6),
        ("question to answer of a pull, p50", "p50_us", 1.0),
        ("the same, p99", "p99_us", 1.0),
    )
    rows = [
        [text, *(time_text(each[name] * scale) for each in record["results"])]
        for text, name, scale in kinds
    ]
    for side in ("prefill", "decode"):
        shares = (each[f"{side}_busy"] for each in record["results"])
        text = f"endpoint threads of {side} instances busy"
        rows.append([text, *(f"{number(100 * share)} %" for share in shares)])
    return table(("", *sizes(record)), rows)


def costs(record: Mapping[str, Any]) -> str:
    """The costs that a simulation is of."""
    found = record["costs"]
    names = {
        "dial_us": "making a link, at the side that dials",
        "accept_us": "making a link, at the other side",
        "ask_us": "a pull, at the side that pulls",
        "answer_us": "a pull, at the owner",
        "wire_us": "from one endpoint to another (assumed)",
    }
    return table(("", "µs"), [[text, number(found[name])] for name, text in names.items()])


CLUSTER = {"arithmetic": arithmetic, "simulated": simulated, "costs": costs}


def scheduler(record: Mapping[str, Any]) -> str:
    """The connector's hooks in vLLM's scheduler."""
    rows = [
        [each["hook"], time_text(each["median_ms"] * 1e3), time_text(each["most_ms"] * 1e3)]
        for each in record["results"]
    ]
    shown = table(("hook", "median", "longest"), rows)
    environment = record["environment"]
    return f"{shown}\nMeasured by `{environment['command']}` at commit {environment['commit']}."


# -- the picture -----------------------------------------------------------------------------------


def panels(results: Mapping[str, Points]) -> list[plots.Panel]:
    """A panel for each axis."""
    made = []
    for axis in ("blocks", "tensors"):
        lines = {
            name: [
                (p["at"][axis], c["us_per_unit"])
                for p in results[axis]
                if (c := contender(p, name))
            ]
            for name in [each["name"] for each in results[axis][0]["contenders"]]
        }
        made.append(plots.Panel(axis, f"{axis} of a pull", "µs for each block", lines))
    links, many, pulling = (results[name] for name in ("peers", "caches", "processes"))
    of_links = {
        "made, each": [(each["links"], each["warm_ms"] * 1e3 / each["links"]) for each in links],
        "pull p50": [(each["links"], each["pull_p50_us"]) for each in links],
        "pull p99": [(each["links"], each["pull_p99_us"]) for each in links],
    }
    made.append(plots.Panel("peers", "links of an instance", "µs", of_links))
    of_caches = {
        f"{text}, {name}": [(each["caches"], each[kind][f"{name}_us"]) for each in many]
        for kind, text in (
            ("allocate", "allocate"),
            ("known", "known pull"),
            ("first", "first pull"),
        )
        for name in ("p50", "p99")
    }
    made.append(plots.Panel("caches", "caches of an owner", "µs", of_caches))
    of_processes = {
        "128 KiB": [(each["processes"], each["small"]["gb_per_s"]) for each in pulling],
        "16 MiB": [(each["processes"], each["big"]["gb_per_s"]) for each in pulling],
    }
    text = "processes that pull from one owner"
    made.append(plots.Panel("processes", text, "GB/s together", of_processes, base=2))
    return made


def complete(records: Records) -> Mapping[str, Points] | None:
    """The results, if all axes of the picture are in them."""
    results: Mapping[str, Points] = (records.get("growth") or {"results": {}})["results"]
    wanted = {"blocks", "tensors", "peers", "caches", "processes"}
    return results if wanted <= set(results) else None


def draw(records: Records, folder: Path) -> None:
    """Draw the picture, if there is something to draw."""
    if (results := complete(records)) is not None:
        told = plots.digest([results])  # type: ignore[list-item]
        plots.draw_panels(panels(results), folder / PICTURE, told)


def wrong_picture(records: Records, folder: Path) -> Iterator[str]:
    """The picture, if it is not of these results."""
    if (results := complete(records)) is not None:
        path, told = folder / PICTURE, plots.digest([results])  # type: ignore[list-item]
        if not path.exists() or told not in path.read_text(encoding="utf-8"):
            yield PICTURE

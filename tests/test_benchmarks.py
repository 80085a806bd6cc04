# SPDX-License-Identifier: Apache-2.0
"""The command ``bench``, the page that is made of its results, and what of it is in a wheel."""

from __future__ import annotations

import ast
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import llm_datadist_torch as ld
from benchmarks import command, common, compare_builds, growth, hosts, page, plots, scaling
from benchmarks.measuring import Effort, Samples, contender, figures, measure, point
from benchmarks.owner import memory_of
from benchmarks.peers import PeerFailedError, Shape, Task
from benchmarks.peers.ours import Relay
from tests.compat.programs import ROOT

pytestmark = pytest.mark.same_on_every_device

PACKAGE = ROOT / "llm_datadist_torch"


def a_record() -> dict[str, object]:
    """A result of the form that the command writes; its figures are of no machine."""
    slow, quick = Samples([0.004, 0.002], [0.001]), Samples([0.001, 0.001], [0.001])
    ours = contender("copy_blocks", "ours", figures(quick, 10**6, 8), ("loop",), "C loop")
    others = [
        contender("loop", "peer", figures(slow, 10**6, 8)),
        contender("C loop", "ceiling", figures(quick, 10**6, 8)),
    ]
    environment = {"cpu": "no CPU", "cores": 2, "memory_bytes": 1 << 30, "kernel": "k"}
    environment |= {"python": "3", "torch": "2", "versions": {"numpy": "1"}, "commit": "c"}
    environment |= {"time": "now", "load_before": 0.5, "command": "python bench"}
    points = [point({"block_bytes": 4096, "tensors": 2, "blocks": 4}, [ours, *others])]
    return {
        "environment": environment,
        "tiny": False,
        "left_out": {"Mooncake TCP": "not installed"},
        "benchmarks": {"copy": points},
    }


def test_the_page_is_that_of_the_committed_results():
    assert page.main(["--check"]) == 0


def test_another_page_or_picture_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = a_record()
    for name in ("RESULTS", "IMAGES", "ROOT"):
        monkeypatch.setattr(page, name, tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(page, "SCALING", tmp_path / "scaling.md")
    (tmp_path / "scaling.md").write_text(scaling.text_of(dict.fromkeys(scaling.FILES)))
    (tmp_path / "bench.json").write_text(json.dumps(record))
    (tmp_path / "benchmarks.md").write_text(page.text_of(record, None))
    picture = tmp_path / "bench_copy.svg"
    picture.write_text(plots.digest(record["benchmarks"]["copy"]))
    assert page.main(["--check"]) == 0
    picture.write_text("another")
    assert page.main(["--check"]) == 1
    record["environment"]["commit"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(record))
    assert page.main(["--check"]) == 1
    assert "benchmarks.md is not what the results give" in capsys.readouterr().out


def test_each_figure_stands_beside_its_baseline_and_ceiling():
    text = page.text_of(a_record(), None)
    assert "| baseline: loop | ratio | ceiling: C loop | ratio |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 4 KiB | 2 | 4 | 1.00 ms"))
    assert row.endswith("| 0.33 GB/s | **3.00** | 1.00 GB/s | **1.00** |")
    assert "- Mooncake TCP: not installed" in text
    assert "{{" not in text


def test_each_goal_stands_beside_what_was_measured():
    """a_record(): torch's index ops aren't in it, and the C loop takes as long as ours."""
    text = page.text_of(a_record(), None)
    rows = [line for line in text.splitlines() if line.startswith("| copy_blocks, scattered")]
    assert [row.split(" | ")[5] for row in rows] == ["not measured", "**met**"]
    record = a_record()
    record["benchmarks"]["copy"][0]["contenders"][2] |= {"p50_us": 100.0}
    text = page.text_of(record, None)
    (missed,) = [line for line in text.splitlines() if "missed at 1 of 1" in line]
    assert missed.startswith("| copy_blocks, scattered | a C loop of memcpy | 0.8 at 4 KiB")
    assert "| 0.12 of the goal | block 4 KiB, tensors 2, blocks 4 | missed" in missed


def test_results_of_several_runs_are_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    first, second = a_record(), a_record()
    second["benchmarks"] = {"hosts": second["benchmarks"]["copy"]}
    second["environment"] |= {"time": "tomorrow", "commit": "later"}
    second["left_out"] = {}
    first["benchmarks"]["push"] = first["benchmarks"]["copy"]
    for each in first["benchmarks"].values():
        each[0]["contenders"] = [c for c in each[0]["contenders"] if c["name"] != "loop"]
    first["left_out"] |= {"hosts": "not there", "loop": "not installed"}
    (tmp_path / "bench.json").write_text(json.dumps(first))
    (tmp_path / "hosts.json").write_text(json.dumps(second))
    found = page.load_all()
    assert set(found["benchmarks"]) == {"copy", "push", "hosts"}
    assert found["left_out"] == {
        "Mooncake TCP": "not installed",
        "loop": "not installed (it is in hosts)",
    }
    assert set(found["apart"]) == {"hosts"}
    text = page.text_of(found, None)
    assert "| commit | c |" in text
    assert "Measured apart from the others:" in text
    assert "| commit | later |" in text


def test_the_page_of_growth_is_of_its_results_alone(tmp_path: Path):
    empty = scaling.text_of(dict.fromkeys(scaling.FILES))
    assert "**Not measured.**" in empty
    assert "{{" not in empty
    records = {
        name: json.loads((page.RESULTS / f"{name}.json").read_text()) for name in scaling.FILES
    }
    text = scaling.text_of(records)
    assert "{{" not in text
    links = records["growth"]["results"]["peers"][-1]["links"]
    assert any(line.startswith(f"| {links} | ") for line in text.splitlines())
    assert list(scaling.wrong_picture(records, page.IMAGES)) == []
    records["growth"]["results"]["peers"][-1]["links"] = 7
    assert "| 7 | " in scaling.text_of(records)
    assert list(scaling.wrong_picture(records, page.IMAGES)) == [scaling.PICTURE]


def test_cost_is_measured_as_work_grows(tmp_path: Path):
    path = tmp_path / "growth.json"
    assert growth.main(["--tiny", "--only", "blocks", "caches", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["tiny"]
    assert [each["at"]["blocks"] for each in record["results"]["blocks"]] == [10, 100]
    (caches,) = record["results"]["caches"]
    assert caches["added"] == caches["caches"] == 10
    assert {"p50_us", "p99_us"} == set(caches["known"]) == set(caches["first"])


def vllm_row(connector: str, added: float, **more: float | str) -> dict[str, object]:
    times = {"fetched": added + 12, "cached": 12, "added": added, "cpu": 60}
    fixed = {"row": "129", "count": 5, "quartiles": [added - 1, added + 2]}
    return fixed | times | {"connector": connector} | more


def test_engines_of_vllm_have_their_own_results():
    rows = [
        vllm_row("ProbedOurs", 8),
        vllm_row("ProbedNixl", 32),
        vllm_row("ProbedOurs", 400, row="32 x 300", requests_per_s=78),
        vllm_row("ProbedNixl", 500, row="32 x 300", requests_per_s=62),
        {"hook": "start_load_kv", "connector": "ProbedOurs"},
    ]
    loads = [{"start": 0, "connector": "ProbedOurs", "before": 0.5, "after": 2}]
    environment = a_record()["environment"] | {"loads": loads}
    text = page.text_of(None, {"environment": environment, "results": rows})
    assert "| 129 | Ours | 5 | 20.0 | 12.0 | 8.00 | 7.00 to 10.0 | 60.0 |  | **0.25** |" in text
    assert "| 129 | Nixl | 5 | 44.0 | 12.0 | 32.0 | 31.0 to 34.0 | 60.0 |  |  |" in text
    assert "| 400 | 399 to 402 | 60.0 | 78.0 | **0.80** |" in text
    assert "Ours 0.50 to 2.00" in text


def test_a_command_is_told_without_folders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [str(PACKAGE / "__main__.py"), "bench", "copy"])
    assert common.command() == "python -m llm_datadist_torch bench copy"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "bench_links.py"), "--links", "2"])
    assert common.command() == "python -m benchmarks.bench_links --links 2"


def test_a_tiny_run_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(a_record() | {"tiny": True}))
    with pytest.raises(SystemExit, match="which has no figures"):
        page.main([])


def test_a_peer_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    from benchmarks.peers.gloo import Gloo

    monkeypatch.setattr(Gloo, "why_not", lambda _: "not here: install it")
    chosen, left_out = command.choose(None)
    assert left_out["gloo"] == "not here: install it"
    assert "gloo" not in [peer.name for peer in chosen]
    with pytest.raises(SystemExit, match="--against gloo: not here: install it"):
        command.choose(["gloo"])


def test_a_peer_that_fails_is_left_out_of_its_point():
    count = itertools.count()

    def fails_later() -> None:
        if next(count) == 2:
            raise PeerFailedError("it has had enough")

    taken = measure({"good": lambda: None, "bad": fails_later}, Effort(5, 0.0, 5))
    assert {name: len(samples.seconds) for name, samples in taken.items()} == {"good": 5}
    record = a_record()
    (copies,) = record["benchmarks"]["copy"]
    copies["contenders"] = [each for each in copies["contenders"] if each["name"] != "loop"]
    other = point(
        {"block_bytes": 64, "tensors": 2, "blocks": 4},
        a_record()["benchmarks"]["copy"][0]["contenders"],
    )
    record["benchmarks"]["copy"] = [other, copies | {"failed": ["loop"]}]
    assert "| failed |  | 1.00 GB/s | **1.00** |" in page.text_of(record, None)


def test_the_command_measures(tmp_path: Path):
    result = tmp_path / "out.json"
    arguments = ["pull", "--tiny", "--against", "gloo", "--json", str(result)]
    assert command.main("bench", arguments) == 0
    record = json.loads(result.read_text())
    assert record["tiny"]
    assert {"cpu", "cores", "kernel", "torch", "versions", "commit"} <= set(record["environment"])
    pulls = record["benchmarks"]["pull"]
    assert [each["at"]["run"] for each in pulls] == [1, 1, 16]
    for each in pulls:
        names = {contender["name"] for contender in each["contenders"]}
        assert {"allocated", "registered", "gloo"} <= names
        for one in each["contenders"]:
            assert {"p50_us", "p99_us", "gb_per_s", "us_per_unit", "cpu_s_per_gb"} <= set(one)
            assert one["peak_bytes"] >= 0
    assert "baseline: gloo" in page.text_of(record, None)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """The package as a wheel has it, with this tree's compiled part."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=90,
    )
    for library in PACKAGE.glob("*.so"):
        shutil.copy(library, tmp_path / "lib" / "llm_datadist_torch")
    return tmp_path / "lib"


def test_it_works_from_a_wheel(built: Path, tmp_path: Path):
    # In a folder that is not the tree's, and the built package first.
    environment = {**os.environ, "PYTHONPATH": str(built)}
    done = subprocess.run(
        [sys.executable, "-m", "llm_datadist_torch", "bench", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mooncake-transfer-engine-non-cuda" in done.stdout
    shipped = built / "llm_datadist_torch" / "shipped" / "benchmarks"
    assert (shipped / "peers" / "loops.c").exists()
    assert (shipped / "forwarder.c").exists()
    assert missing_modules(shipped) == set()


def missing_modules(shipped: Path) -> set[str]:
    """Modules of ``benchmarks`` that files of a wheel import, and that are not in it."""
    wanted = set()
    for path in shipped.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                is_file = (shipped.parent / f"{node.module.replace('.', '/')}.py").exists()
                wanted |= {node.module} if is_file else {node.module, *below}
    there = {path.relative_to(shipped.parent) for path in shipped.rglob("*.py")}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in there}
    classes = {name for name in wanted if name.rpartition(".")[2][:1].isupper()}
    return {
        name
        for name in wanted - names - classes
        if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    }


@pytest.mark.needs_netns
def test_two_hosts_are_connected_by_the_wire_only(tmp_path: Path):
    """Their own networks: what one host's device carries is what the contenders have moved."""
    result = tmp_path / "out.json"
    arguments = ["hosts", "--tiny", "--against", "gloo", "stream", "--json", str(result)]
    assert command.main("bench", arguments) == 0
    points = json.loads(result.read_text())["benchmarks"]["hosts"]
    assert [each["at"]["run"] for each in points] == [1, 1, 16]
    for each in points:
        names = {contender["name"] for contender in each["contenders"]}
        assert {"relay", "TCP stream", "gloo"} <= names
        assert not names & {"allocated", "registered", "over nixl", "raw NIXL"}
        assert "relay: longest gap, ms" in each["further"]


def connected(delay_ms: float | None, pipe: Connection) -> None:
    """A host that is one end of a wire; says how long an answer from the other end takes."""
    hosts.leave()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=echo, args=(theirs,), daemon=True)
    other.start()
    wire = hosts.Wire(delay_ms)
    wire.connect(ours.recv())
    ours.send("connected")
    with socket.create_connection((hosts.FAR, ours.recv()), timeout=60) as sock:
        began = time.perf_counter()
        sock.sendall(b"x")
        answer = sock.recv(1)
        pipe.send((answer, time.perf_counter() - began, hosts.carried()))
    wire.close()


def echo(pipe: Connection) -> None:
    """The other end: answers one byte."""
    hosts.leave()
    pipe.send(os.getpid())
    pipe.recv()
    hosts.set_up(hosts.FAR)
    with socket.create_server((hosts.FAR, 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
        with sock:
            sock.sendall(sock.recv(1))
            sock.recv(1)


@pytest.mark.needs_netns
@pytest.mark.parametrize("delay_ms", [None, 0.0, 30.0])
def test_what_is_sent_comes_over_a_wire_after_its_delay(delay_ms: float | None):
    if delay_ms is not None and (reason := hosts.why_no_delay()):
        # A property of this one wire, not of the machine's namespaces.
        assert "TUN" in reason
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=connected, args=(delay_ms, theirs))
    process.start()
    theirs.close()
    answer, seconds, nbytes = ours.recv()
    process.join(60)
    assert answer == b"x"
    assert nbytes > 2
    # No speed: what holds packets back for 30 ms each way can't let an answer come sooner.
    assert seconds >= 2 * (delay_ms or 0.0) / 1000


def test_a_benchmark_that_can_not_be_had_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hosts, "why_no_hosts", lambda: "no namespaces: be root")
    result = tmp_path / "out.json"
    assert command.main("bench", ["hosts", "--tiny", "--json", str(result)]) == 0
    record = json.loads(result.read_text())
    assert record["left_out"]["hosts"] == "no namespaces: be root"
    assert "hosts" not in record["benchmarks"]
    text = page.text_of(a_record() | {"left_out": record["left_out"]}, None)
    assert "- hosts: no namespaces: be root" in text


def test_a_way_other_than_the_named_one_does_not_count():
    """On one host the transport local maps the memory, and the relay has carried nothing."""
    with (
        ld.open(listen="127.0.0.1:0") as node,
        memory_of(node, Shape(4096, 1, 1, 4), owner=True) as memory,
        Relay().serve(memory) as offer,
        ExitStack() as stack,
    ):
        ids = memory.shape.ids(1)
        pull = stack.enter_context(Relay().mover(Task(memory, offer, False, ids, ids)))
        pull()
        with pytest.raises(SystemExit, match="should all go by 'relay', and the counters say"):
            stack.close()


def test_the_table_of_two_builds_is_that_of_its_results():
    found = json.loads(compare_builds.RESULTS.read_text(encoding="utf-8"))
    page_text = compare_builds.PAGE.read_text(encoding="utf-8")
    assert compare_builds.with_table(page_text, found) == page_text
    assert compare_builds.table(found) in page_text

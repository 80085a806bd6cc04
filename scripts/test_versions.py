# SPDX-License-Identifier: Apache-2.0
"""Runs the core suite from one installed wheel under the versions that people run.

Each row of scripts/versions.toml becomes an environment of its own; the tests come from the sdist
beside the wheel, so that what is installed is what is tested. A row with torch_npu also runs the
suite of simulated NPUs. A row's result is one JSON file, also where its versions can't be
installed, and scripts/make_support_table.py makes docs/support.md of those. An environment, which
takes 1 to 2 GB, is removed when its row is done.

    python scripts/test_versions.py --wheel dist/*_x86_64.whl --out FOLDER [ROW ...]

A torch that is a CUDA build is installed without CUDA's packages; make_cuda_stubs.py lets it load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "scripts" / "versions.toml"
ROW_TIMEOUT_S = 3600
PACKAGE = "llm_datadist_torch"
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class InstallError(Exception):
    """The versions of a row could not be installed; the text is what pip says."""


@dataclass(frozen=True)
class Row:
    """One combination of versions; a package whose version is "" is left out."""

    name: str
    python: str
    torch: str
    torch_npu: str = ""
    numpy: str = ""
    nixl: str = ""


@dataclass(frozen=True)
class Plan:
    """What every row has in common. The tests are files, each with what it covers."""

    cpu_tests: dict[str, str]
    npu_tests: dict[str, str]
    requirements: list[str]
    torch_requirements: list[str]
    npu_requirements: list[str]
    rows: list[Row] = field(default_factory=list)


def plan() -> Plan:
    """What scripts/versions.toml says."""
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in content.pop("row")]
    return Plan(rows=rows, **content)


class Environment:
    """A virtual environment with the versions of a row, and the wheel."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._stubs = folder / "cuda-stubs"

    def make(self, common: Plan, wheel: Path) -> None:
        """Install everything; an environment that is there already only gets the wheel anew."""
        if not self.python.exists():
            subprocess.run([python_of(self.row.python), "-m", "venv", str(self.folder)], check=True)
        alone = [f"torch=={self.row.torch}"]
        if self.row.torch_npu:
            self._pip(*common.npu_requirements)
            (simulator,) = wheel.parent.glob("ascend_sim-*.whl")
            alone += [f"torch_npu=={self.row.torch_npu}", str(simulator)]
        if self.row.nixl:
            alone.append(f"nixl-cu12=={self.row.nixl}")
        # First, for these are what may not be there.
        self._pip("--no-deps", *alone)
        numpy = [f"numpy=={self.row.numpy}"] if self.row.numpy else []
        self._pip(*common.requirements, *common.torch_requirements, *numpy)
        self._pip("--no-deps", "--force-reinstall", str(wheel))
        if not self._stubs.exists():
            make = str(ROOT / "scripts" / "make_cuda_stubs.py")
            command = [
                sys.executable,
                make,
                "--python",
                str(self.python),
                "--out",
                str(self._stubs),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run its Python. Nothing of the caller's Python paths gets in."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        paths = [str(self._stubs), kept.get("LD_LIBRARY_PATH", "")]
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            env=kept | {"LD_LIBRARY_PATH": ":".join(filter(None, paths)), "PYTHONNOUSERSITE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=ROW_TIMEOUT_S,
            check=False,
        )

    def _pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--no-compile", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise InstallError(errors[0].removeprefix("ERROR: ") if errors else done.stderr.strip())


def python_of(version: str) -> str:
    """An interpreter of that version."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    for candidate in (
        shutil.which(f"python{version}"),
        *sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")),
    ):
        if (
            candidate
            and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode
            == 0
        ):
            return str(candidate)
    raise SystemExit(f"there is no python{version} here")


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The tests of the sdist that the wheel was made of, and what they read; not the package."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / PACKAGE)
    return root


PROBE = """
import importlib.metadata as m, json, llm_datadist_torch as ld
from llm_datadist_torch import _C
import torch
found = {"torch": torch.__version__}
for name in ("torch_npu", "numpy", "nixl-cu12", "msgspec"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({"file": ld.__file__, "version": ld.__version__, "build": dict(_C.build_facts()),
                  "versions": found}))
"""


def test_row(common: Plan, row: Row, wheel: Path, folder: Path, jobs: int) -> dict[str, object]:
    """Make the row's environment, run the suite in it, and say what came of it."""
    environment = Environment(row, folder / row.name)
    try:
        environment.make(common, wheel)
    except InstallError as error:
        return {"row": row.name, "wanted": asdict(row), "error": str(error)}
    (sdist,) = wheel.parent.glob(f"{PACKAGE}-*.tar.gz")
    tests = unpack_tests(sdist, folder / f"{row.name}-tests")
    probe = environment.run(
        "-c", f"import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\n{PROBE}", cwd=tests
    )
    if probe.returncode:
        last = probe.stdout.strip().splitlines()[-1]
        return {"row": row.name, "wanted": asdict(row), "error": last}
    facts = json.loads(probe.stdout.splitlines()[-1])
    if not Path(facts["file"]).is_relative_to(environment.folder):
        raise SystemExit(f"{row.name}: {facts['file']} is not what was installed")
    options = ["-n", str(jobs), "--dist", "worksteal"]
    runs = {"cpu": run_suite(environment, [*options, *common.cpu_tests], tests)}
    if row.torch_npu:
        simulated = ["-p", "ascend_sim.pytest_plugin", "--ascend-sim=lazy", *options]
        runs["simulated npu"] = run_suite(environment, [*simulated, *common.npu_tests], tests)
    return {
        "row": row.name,
        "python": row.python,
        "versions": facts["versions"],
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "commit": facts["build"]["commit"],
        "runs": runs,
    }


def run_suite(environment: Environment, arguments: list[str], tests: Path) -> dict[str, object]:
    """Run pytest, and count."""
    began = time.monotonic()
    options = ("-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-rfE")
    done = environment.run("-m", "pytest", *options, *arguments, cwd=tests)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {
        kind.rstrip("s") if kind.startswith("error") else kind: int(number)
        for number, kind in COUNT.findall(last)
    }
    if done.returncode:
        print(done.stdout[-6000:])
    seconds = round(time.monotonic() - began)
    failures = FAILED.findall(done.stdout)
    return {"status": done.returncode, **counts, "failures": failures, "seconds": seconds}


def main() -> int:
    """Run the rows that are named, or all."""
    common = plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON file per row")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--keep", action="store_true", help="don't remove the environments")
    parser.add_argument("--jobs", type=int, default=0, help="processes that run tests (here: 0)")
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=", ".join(row.name for row in common.rows)
    )
    arguments = parser.parse_args()
    known = {row.name: row for row in common.rows}
    wanted = arguments.rows or list(known)
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"no such row: {', '.join(unknown)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in wanted:
        print(f"{name}: making its environment, then testing", flush=True)
        environments = arguments.environments.resolve()
        result = test_row(
            common, known[name], arguments.wheel.resolve(), environments, arguments.jobs
        )
        if not arguments.keep:
            shutil.rmtree(environments / name, ignore_errors=True)
            shutil.rmtree(environments / f"{name}-tests", ignore_errors=True)
        runs = result.get("runs", {})
        (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {json.dumps(runs or result)}", flush=True)
        failed += "error" in result or any(run["status"] for run in runs.values())
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

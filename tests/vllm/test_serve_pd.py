# SPDX-License-Identifier: Apache-2.0
"""The example as users run it: servers, proxy, and the comparison with a server by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import eventually
from tests.vllm.engines import ROOT

pytestmark = pytest.mark.timeout(900)

START_S = 600


class Serving:
    """The script, running."""

    def __init__(self, directory: Path, mode: str, whole: str) -> None:
        self.directory = directory
        self._output = directory / "output"
        told = {"MODE": mode, "WHOLE": whole, "PORT": "0", "BASE_PORT": "0", "LOGS": str(directory)}
        told |= {"WAIT_S": str(START_S), "PYTHON": sys.executable}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                ["examples/vllm/serve_pd.sh"],
                cwd=ROOT,
                env=os.environ | told | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        logs = [path.read_text(errors="replace")[-3000:] for path in self.directory.glob("*.log")]
        return "\n".join([self._output.read_text(), *logs])

    def url(self, name: str) -> str:
        found = re.search(rf"^{name}: (http\S+)", self._output.read_text(), re.MULTILINE)
        assert found, self.text()
        return found[1]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.text()
        return "\nready: " in self._output.read_text()

    def processes(self) -> list[int]:
        """Of its session: itself, its servers and theirs."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


MODES = ("pull", "push")


@pytest.fixture(scope="module")
def servings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Serving]]:
    """Both modes at the same time; one server without a connector serves both comparisons."""
    made = {
        mode: Serving(tmp_path_factory.mktemp(mode), mode, "1" if mode == "pull" else "")
        for mode in MODES
    }
    try:
        for each in made.values():
            assert eventually(each.is_ready, START_S), each.text()
        yield made
    finally:
        for each in made.values():
            for pid in each.processes():
                os.kill(pid, signal.SIGKILL)
            each.process.wait(60)


@pytest.mark.parametrize("mode", MODES)
def test_texts_are_those_of_a_server_without_a_connector(
    servings: dict[str, Serving], mode: str
) -> None:
    serving = servings[mode]
    command = [sys.executable, "examples/vllm/compare.py", "--proxy", serving.url("ready")]
    command += ["--whole", servings["pull"].url("without a connector")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{serving.text()}"
    assert done.stdout.count(": equal") == 12
    decode = (serving.directory / "decode0.log").read_text()
    for wrong in ("was not fetched", "was not pushed", "is computed here", "is not handed over"):
        assert wrong not in decode


@pytest.mark.parametrize("mode", MODES)
def test_health_names_all_servers(servings: dict[str, Serving], mode: str) -> None:
    url = servings[mode].url("ready") + "/health"
    with urllib.request.urlopen(url, timeout=30) as answer:
        told = json.load(answer)
    assert [list(each.values()) for each in told.values()] == [[True], [True]]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_when_it_is_ended(servings: dict[str, Serving], mode: str) -> None:
    serving = servings[mode]
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(120) == 143
    assert eventually(lambda: not serving.processes(), 60)

# SPDX-License-Identifier: Apache-2.0
"""``examples/vllm/serve_pd.sh`` as tests run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.vllm.engines import ROOT

START_S = 600
MODES = ("pull", "push")
WRONG = ("was not fetched", "was not pushed", "is computed here", "is not handed over")
"""What a decode server says of a prompt that it had to compute itself."""


class Serving:
    """The script, running.

    Args:
        directory: Of its logs.
        mode: "pull" or "push".
        whole: "1": with a server without a connector.
        further: Variables of the script.
    """

    def __init__(self, directory: Path, mode: str, whole: str, **further: str) -> None:
        self.directory = directory
        self._output = directory / "output"
        told = {"MODE": mode, "WHOLE": whole, "PORT": "0", "BASE_PORT": "0", "LOGS": str(directory)}
        told |= {"WAIT_S": str(START_S), "PYTHON": sys.executable, **further}
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

    def compare(self, whole: str) -> None:
        """Send prompts to the proxy: their texts must be those of a server at ``whole``."""
        command = [sys.executable, "examples/vllm/compare.py", "--proxy", self.url("ready")]
        command += ["--whole", whole]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.text()}"
        assert done.stdout.count(": equal") == 12
        decode = (self.directory / "decode0.log").read_text()
        for wrong in (
            "was not fetched",
            "was not pushed",
            "is computed here",
            "is not handed over",
        ):
            assert wrong not in decode

    def end(self) -> None:
        """Nothing of it is left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)

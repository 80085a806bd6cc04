# SPDX-License-Identifier: Apache-2.0
"""The conformance tests run on a transport of somebody else, as docs/adding_a_transport.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transports.conftest import EXAMPLE

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
PICKED = "tests/conformance/test_pull_push.py"


def conformance(package: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run conformance tests in a process that has this package, and may use this transport."""
    env = os.environ | {"LLMDD_TRANSPORT": name, "PYTHONPATH": str(package)}
    command = [sys.executable, "-m", "pytest", PICKED, "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.host_memory_only
@pytest.mark.parametrize("good", [True, False], ids=["as it is", "with a wrong byte"])
def test_the_example(tmp_path: Path, good: bool) -> None:
    info = tmp_path / "procmem_transport-1.0.dist-info"
    info.mkdir()
    for path in (EXAMPLE / info.name).iterdir():
        (info / path.name).write_bytes(path.read_bytes())
    code = (EXAMPLE / "procmem_transport.py").read_text()
    if not good:
        # The right number of bytes, from the wrong place.
        code = code.replace("[here], remote + done)", "[here], remote + done + 1)")
    (tmp_path / "procmem_transport.py").write_text(code)
    done = conformance(tmp_path, "procmem", "-k", "procmem and (two-sided or remote-accessible)")
    assert (done.returncode == 0) == good, done.stdout[-3000:]
    assert ("passed" in done.stdout) if good else ("failed" in done.stdout)


def test_one_that_is_not_installed(tmp_path: Path) -> None:
    done = conformance(tmp_path, "nothing", "--collect-only")
    assert done.returncode != 0
    assert "LLMDD_TRANSPORT=nothing: it is not installed" in done.stdout + done.stderr

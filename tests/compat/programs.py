# SPDX-License-Identifier: Apache-2.0
"""Programs run as users run them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_module(
    *arguments: str, path: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m llm_datadist_torch ...`` with ``path`` as PYTHONPATH."""
    return run_python("-m", "llm_datadist_torch", *arguments, path=path, cwd=cwd)


def run_python(
    *arguments: str, path: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT)]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]

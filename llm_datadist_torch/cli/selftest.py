# SPDX-License-Identifier: Apache-2.0
"""``doctor --npu-selftest``: tries the NPUs step by step, and writes one file to send back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_datadist_torch.cli.report import Report
from llm_datadist_torch.values.environment import npu_is_simulated

_STEPS = "llm_datadist_torch.cli.selftest_steps"
_TOTAL_S = 900
_LOG_CHARACTERS = 20_000


def run(report: Report, path: Path) -> int:
    """Go through all steps in a process of their own, which may hang or die.

    The file is written anew after each step, so that it says how far they came.

    Args:
        report: What ``doctor`` has found, which goes into the file.
        path: The file, JSON.

    Returns:
        The exit status: 0 if all steps did as on the simulated runtime, 1 if one did not, 2 if they
        did not come to an end.
    """
    content: dict[str, Any] = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "simulated": npu_is_simulated(),
        "doctor": asdict(report),
        "steps": {},
        "ended": "it did not come to an end",
        "log": "",
    }
    log: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", _STEPS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    timer = threading.Timer(_TOTAL_S, process.kill)
    timer.start()
    with process:
        reader = threading.Thread(target=lambda: log.extend(process.stderr or ()))
        reader.start()
        for name, entry in _entries(process):
            content["steps"][name] = entry
            path.write_text(json.dumps(content, indent=1) + "\n")
            sys.stdout.write(_line(name, entry))
            sys.stdout.flush()
        status = process.wait()
        reader.join()
    timer.cancel()
    content["ended"] = f"with status {status}"
    content["log"] = "".join(log)[-_LOG_CHARACTERS:]
    path.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"written to {path}: send this file back\n")
    if status != 0:
        return 2
    return 0 if all(entry["ok"] for entry in content["steps"].values()) else 1


def _entries(process: subprocess.Popen[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in process.stdout or ():
        if line.startswith("STEP "):
            name, entry = json.loads(line.removeprefix("STEP "))
            yield name, entry


def _line(name: str, entry: dict[str, Any]) -> str:
    state = "ok" if entry["ok"] else "differs" if "differs" in entry else "failed"
    text = entry.get("error") or ", ".join(
        f"{key}={value}" for key, value in entry["facts"].items()
    )
    line = f"{state:<8} {name} ({entry['seconds']} s): {text}\n"
    for key in entry.get("differs", ()):
        line += f"         the simulated runtime gives {key}={entry['simulator'][key]}\n"
    return line

# SPDX-License-Identifier: Apache-2.0
"""Which process a worker is, and whether that process has ended, as the kernel knows it."""

from __future__ import annotations

import os
from pathlib import Path

from llm_datadist_torch.vllm.protocol import Process

_NAMESPACE = Path("/proc/self/ns/pid")
# Of /proc/PID/stat, after the name in brackets.
_STATE, _START_TIME = 0, 19
_ENDED = ("Z", "X", "x")


def this_process() -> Process:
    """This process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    _, started = _state(pid) or ("", 0)
    return Process(boot, _NAMESPACE.stat().st_ino, pid, started)


def has_ended(process: Process, me: Process) -> bool:
    """Whether a process has ended, as far as can be known from here.

    Args:
        process: Which.
        me: This process.

    Returns:
        False also where it can't be known: on another host, or in another PID namespace.
    """
    if (process.host, process.namespace) != (me.host, me.namespace):
        return False
    found = _state(process.pid)
    return found is None or found[0] in _ENDED or found[1] != process.started


def _state(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields[_STATE], int(fields[_START_TIME])

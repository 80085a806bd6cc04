# SPDX-License-Identifier: Apache-2.0
"""Programs in the style of the reference's own samples, device to device, each rank a process.

They say `import llm_datadist`, use nothing that the reference hasn't, and compare what arrived.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.compat.programs import ROOT

HERE = Path(__file__).parent
PROGRAMS = {
    "pull_rows_by_rank_table": 2,
    "pull_blocks_by_rank_table": 2,
    "rows_into_blocks": 2,
    "push_blocks": 2,
    "push_rows": 2,
    "switch_role": 2,
    "layer_by_layer": 3,
    "many_prompts": 3,
    "by_transfer_backend": 2,
}
"""Their names, and how many processes each is."""
TIMEOUT_S = 180
PORTS = 4
"""How many ports side by side a program may listen at."""

pytestmark = [pytest.mark.needs_npu]


def ports_side_by_side(count: int, held: ExitStack) -> int:
    """The first of some ports that are free now, as whoever writes a configuration would choose.

    No other test on this machine gets them until ``held`` is closed: a program listens some time
    after it was told to.
    """
    for first in range(26000, 32000, count):
        with suppress(OSError), ExitStack() as stack:
            lock = Path(tempfile.gettempdir(), f"llm_datadist_torch-test-ports-{first}")
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            held.push(stack.pop_all())
            return first
    raise AssertionError("no free ports")


def wait_for(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Their exit codes; None of those that still ran when one had failed, or the time was up."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    return codes


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, tmp_path: Path) -> None:
    chooses_its_engine = program == "by_transfer_backend"
    assert run(program, tmp_path) == {"hixl" if chooses_its_engine else "device-ipc"}


# One for each kind of operation: by rank table, in blocks, in rows, layer by layer.
@pytest.mark.parametrize("program", ["pull_blocks_by_rank_table", "push_rows", "layer_by_layer"])
def test_program_by_hixl(program: str, tmp_path: Path) -> None:
    assert run(program, tmp_path, lambda _: {"TRANSPORT": "hixl"}) == {"hixl"}


@pytest.mark.needs_two_npus
def test_each_rank_sees_a_device_of_its_own(tmp_path: Path) -> None:
    """Which is device 0 to all of them."""
    visible = {rank: {"ASCEND_RT_VISIBLE_DEVICES": str(rank)} for rank in range(2)}
    assert run("rows_into_blocks", tmp_path, visible.__getitem__) == {"device-ipc"}


def run(
    program: str, tmp_path: Path, settings: Callable[[int], dict[str, str]] = lambda _: {}
) -> set[str]:
    """Run a program; returns the paths that its bytes took.

    ``settings`` are further environment variables of a rank.
    """
    world = PROGRAMS[program]
    command = [sys.executable, "-m", "llm_datadist_torch", "run", str(HERE / f"{program}.py")]
    outputs = [tmp_path / f"rank{rank}.txt" for rank in range(world)]
    with ExitStack() as stack:
        first = ports_side_by_side(PORTS + 1, stack)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(first + PORTS),
            "WORLD_SIZE": str(world),
            "FIRST_PORT": str(first),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        processes = []
        for rank, output in enumerate(outputs):
            process = subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank)} | settings(rank),
                stdout=stack.enter_context(output.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        codes = wait_for(processes)
    told = "\n".join(f"-- {path.name}\n{path.read_text()}" for path in outputs)
    assert codes == [0] * world, told
    assert all("\ndone\n" in path.read_text() for path in outputs), told
    return set(re.findall(r"^moved by (\S+)$", told, re.MULTILINE))


def test_every_program_is_run() -> None:
    found = {path.stem for path in HERE.glob("*.py")} - {"common", Path(__file__).stem}
    assert found == set(PROGRAMS)

# SPDX-License-Identifier: Apache-2.0
"""The samples in the style of the reference's run unchanged, each party a process of its own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.compat.programs import ROOT, free_ports

SAMPLES = ROOT / "examples" / "reference_style"
TWO_PARTIES = [
    "cache_to_blocks",
    "layerwise",
    "pull_blocks_swap",
    "pull_cache_keys",
    "push_blocks_switch_role",
    "push_cache",
]


def run_parties(sample: str, parties: dict[str, list[str]]) -> None:
    """Run a sample once per party, all at once; each must end well and say that it is done."""
    path = str(SAMPLES / f"{sample}.py")
    command = [sys.executable, "-m", "llm_datadist_torch", "run", path]
    with ExitStack() as stack:
        processes = {}
        for party, arguments in parties.items():
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes[party] = process
        for party, process in processes.items():
            out, err = process.communicate(timeout=90)
            assert process.returncode == 0, (party, out, err)
            assert f"{party} done" in out


@pytest.mark.parametrize("sample", TWO_PARTIES)
def test_sample(sample: str):
    ports = free_ports(3)
    names = ("--prompt-port", "--decoder-port", "--meet-port")
    given = [text for name, port in zip(names, ports, strict=True) for text in (name, str(port))]
    run_parties(sample, {role: ["--role", role, *given] for role in ("prompt", "decoder")})


@pytest.mark.thorough
def test_several_prompts_and_decoders():
    meet, *ports = map(str, free_ports(3))
    given = ["--meet-port", meet, "--prompt-ports", *ports]
    run_parties("many_to_many", {f"rank {n}": ["--rank", str(n), *given] for n in range(4)})


def test_every_sample_is_run():
    found = {path.stem for path in SAMPLES.glob("*.py")} - {"common"}
    assert found == {*TWO_PARTIES, "many_to_many"}

# SPDX-License-Identifier: Apache-2.0
"""The samples in the style of the reference's run unchanged, as two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.compat.programs import ROOT, free_ports

SAMPLES = ["pull_blocks_swap", "pull_cache_keys", "push_blocks_switch_role"]


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample(sample: str):
    ports = free_ports(3)
    names = ("--prompt-port", "--decoder-port", "--meet-port")
    given = [text for name, port in zip(names, ports, strict=True) for text in (name, str(port))]
    path = ROOT / "examples" / "reference_style" / f"{sample}.py"
    command = [sys.executable, "-m", "llm_datadist_torch", "run", str(path), *given]
    processes = {
        role: subprocess.Popen(
            [*command, "--role", role],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for role in ("prompt", "decoder")
    }
    try:
        for role, process in processes.items():
            out, err = process.communicate(timeout=90)
            assert process.returncode == 0, (role, out, err)
            assert f"{role} done" in out
    finally:
        for process in processes.values():
            process.kill()
            process.wait()

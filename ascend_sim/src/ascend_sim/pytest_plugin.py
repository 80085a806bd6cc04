# SPDX-License-Identifier: Apache-2.0
"""Tests on simulated NPUs: ``pytest --ascend-sim``, also in processes of pytest-xdist.

An entry point makes pytest load it wherever the package is installed, before any conftest.py can
import torch.
"""

from __future__ import annotations

import argparse

import pytest

from ascend_sim.activation import activate, is_active
from ascend_sim.environment import environment_text
from ascend_sim.settings import SCHEDULERS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("ascend-sim", "simulated Ascend runtime")
    group.addoption(
        "--ascend-sim",
        nargs="?",
        const=SCHEDULERS[0],
        type=_scheduler,
        metavar="SCHEDULER",
        help="put a simulated Ascend runtime under torch_npu, with this scheduler: "
        f"{', '.join(SCHEDULERS)} ({SCHEDULERS[0]})",
    )
    group.addoption("--ascend-sim-seed", type=int, help="of its scheduler `random`")


def _scheduler(text: str) -> str:
    if text not in SCHEDULERS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no scheduler ({', '.join(SCHEDULERS)}); before a file, "
            f"write --ascend-sim={SCHEDULERS[0]}"
        )
    return text


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Activate the simulator before the tests' own code is imported."""
    options = early_config.known_args_namespace
    if options.ascend_sim is not None:
        try:
            activate(scheduler=options.ascend_sim, seed=options.ascend_sim_seed)
        except (RuntimeError, ValueError) as error:
            raise pytest.UsageError(str(error)) from error


def pytest_report_header() -> str | None:
    """Say what the tests ran on, so that a failure can be repeated."""
    if not is_active():
        return None
    names = ("SCHEDULER", "SEED", "SOC", "DEVICES")
    return "ascend-sim: SIMULATED NPUs, " + ", ".join(
        f"{name.lower()} {environment_text(f'ASCEND_SIM_{name}')}" for name in names
    )

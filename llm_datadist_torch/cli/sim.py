# SPDX-License-Identifier: Apache-2.0
"""``sim``: runs a command with the simulated Ascend runtime under torch_npu. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llm_datadist_torch.ascend_sim.activation import is_active, prepare_environment
from llm_datadist_torch.ascend_sim.build import SimulatorBuildError
from llm_datadist_torch.ascend_sim.settings import SCHEDULERS, Settings

USAGE_TAIL = (
    "sim [-h] [--devices N] [--memory SIZE] [--scheduler NAME] [--seed N] [--soc NAME] "
    "-- COMMAND [ARGUMENTS ...]"
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options of ``sim``."""
    default = Settings()
    command.add_argument("--devices", type=int, default=default.devices, help="default: 2")
    command.add_argument("--memory", default=default.memory, help="of each; default: 2GiB")
    command.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default=default.scheduler,
        help="when what is in a stream runs: when somebody waits for it, at random, or at once",
    )
    command.add_argument("--seed", type=int, help="of --scheduler random; default: a random one")
    command.add_argument("--soc", default=default.soc, help="which chip; default: Ascend910B1 (A2)")


def run(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Become the command.

    Args:
        options: Of `add_options`.
        command: Program and arguments.

    Returns:
        2 if the settings are wrong or the simulator can't be built, 127 if there is no such
        program; otherwise it does not return.
    """
    if is_active():
        sys.stderr.write("sim: the simulator is active already; its settings stay\n")
    else:
        try:
            prepare_environment(
                Settings(
                    options.devices, options.memory, options.scheduler, options.seed, options.soc
                )
            )
        except (ValueError, SimulatorBuildError) as error:
            sys.stderr.write(f"sim: {error}\n")
            return 2
    sys.stderr.flush()
    try:
        os.execvp(command[0], list(command))  # noqa: S606 (that is what running a command is)
    except OSError as error:
        sys.stderr.write(f"sim: can't run {command[0]!r}: {error.strerror}\n")
        return 127

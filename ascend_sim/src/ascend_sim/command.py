# SPDX-License-Identifier: Apache-2.0
"""Runs a command with the simulated Ascend runtime under torch_npu. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ascend_sim.activation import is_active, prepare_environment
from ascend_sim.build import SimulatorBuildError
from ascend_sim.settings import SCHEDULERS, Settings

__all__ = ["main"]

_USAGE_TAIL = (
    "[-h] [--devices N] [--memory SIZE] [--scheduler NAME] [--seed N] [--soc NAME] "
    "-- COMMAND [ARGUMENTS ...]"
)


def main(prog: str, arguments: Sequence[str]) -> int:
    """Become the command that follows ``--``.

    Args:
        prog: How the user called this, for messages.
        arguments: The options, ``--``, the command and its arguments.

    Returns:
        2 if the settings are wrong or the simulator can't be built, 127 if there is no such
        program; otherwise it does not return.
    """
    parser = _parser(prog)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:at]), list(arguments[at + 1 :])
    if not command:
        parser.error("no command given after --")
    if is_active():
        sys.stderr.write(f"{prog}: the simulator is active already; its settings stay\n")
    else:
        try:
            prepare_environment(
                Settings(
                    options.devices, options.memory, options.scheduler, options.seed, options.soc
                )
            )
        except (ValueError, SimulatorBuildError) as error:
            sys.stderr.write(f"{prog}: {error}\n")
            return 2
    sys.stderr.flush()
    try:
        os.execvp(command[0], command)  # noqa: S606 (that is what running a command is)
    except OSError as error:
        sys.stderr.write(f"{prog}: can't run {command[0]!r}: {error.strerror}\n")
        return 127


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} {_USAGE_TAIL}",
        description="run a command on simulated NPUs: torch_npu over host memory, not for figures",
    )
    default = Settings()
    parser.add_argument("--devices", type=int, default=default.devices, help="default: 2")
    parser.add_argument("--memory", default=default.memory, help="of each; default: 2GiB")
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default=default.scheduler,
        help="when what is in a stream runs: when somebody waits for it, at random, or at once",
    )
    parser.add_argument("--seed", type=int, help="of --scheduler random; default: a random one")
    parser.add_argument("--soc", default=default.soc, help="which chip; default: Ascend910B1 (A2)")
    return parser

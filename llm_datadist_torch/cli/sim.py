# SPDX-License-Identifier: Apache-2.0
"""``sim``: runs a command on simulated NPUs, by the distribution ascend-sim. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run(prog: str, arguments: Sequence[str]) -> int:
    """Become the command that follows ``--``.

    Args:
        prog: How the user called this, for messages.
        arguments: Options of the simulator, ``--``, the command and its arguments.

    Returns:
        2 if the simulator is not installed or its settings are wrong, 127 if there is no such
        program; otherwise it does not return.
    """
    try:
        from ascend_sim.command import main
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("ascend_sim"):
            raise
        sys.stderr.write(
            f"{prog}: the simulated Ascend runtime is the distribution ascend-sim, which is not"
            " installed: pip install ascend-sim, or pip install ./ascend_sim from a checkout of"
            " llm_datadist_torch\n"
        )
        return 2
    return main(prog, arguments)

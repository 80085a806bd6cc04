# SPDX-License-Identifier: Apache-2.0
"""``python -m ascend_sim -- COMMAND`` and ``ascend-sim -- COMMAND``."""

from __future__ import annotations

import sys

from ascend_sim.command import main


def run() -> int:
    """The script ``ascend-sim``."""
    return main("ascend-sim", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main("python -m ascend_sim", sys.argv[1:]))

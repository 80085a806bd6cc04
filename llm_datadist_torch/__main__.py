# SPDX-License-Identifier: Apache-2.0
"""``python -m llm_datadist_torch``."""

from __future__ import annotations

import sys

from llm_datadist_torch.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

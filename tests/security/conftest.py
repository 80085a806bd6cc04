# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the fault tests: this process's instance, and peers."""

from tests.faults.conftest import here, peers

__all__ = ["here", "peers"]

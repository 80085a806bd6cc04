# SPDX-License-Identifier: Apache-2.0
"""Builds the simulator before the tests that need it, outside of their time limits."""

from __future__ import annotations

import pytest

from tests.ascend_sim.simulated import simulate


def pytest_collection_finish(session: pytest.Session) -> None:
    marked = [item for item in session.items if item.get_closest_marker("needs_torch_npu")]
    if any(item.get_closest_marker("skip") is None for item in marked):
        done = simulate("-c", "", timeout=900)
        assert done.returncode == 0, done.stderr

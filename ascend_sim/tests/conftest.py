# SPDX-License-Identifier: Apache-2.0
"""Builds the simulator before the tests that need it, outside of their time limits."""

from __future__ import annotations

import importlib.util

import pytest

from tests.simulated import simulate

_HAS_TORCH_NPU = importlib.util.find_spec("torch_npu") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_torch_npu: the test needs torch_npu, installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("needs_torch_npu") and not _HAS_TORCH_NPU:
            item.add_marker(pytest.mark.skip(reason="needs torch_npu, installed"))


def pytest_collection_finish(session: pytest.Session) -> None:
    marked = [item for item in session.items if item.get_closest_marker("needs_torch_npu")]
    if marked and _HAS_TORCH_NPU:
        done = simulate("-c", "", timeout=900)
        assert done.returncode == 0, done.stderr

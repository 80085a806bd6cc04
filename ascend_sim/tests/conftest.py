# SPDX-License-Identifier: Apache-2.0
"""Builds the simulator before the tests that need it, outside of their time limits."""

from __future__ import annotations

import importlib.util
import os
import socket

import pytest

from tests.simulated import simulate

# The tests start processes on simulated NPUs; this one imports torch without torch_npu.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
_HAS_TORCH_NPU = importlib.util.find_spec("torch_npu") is not None


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# marker -> (what it needs, whether this machine has it)
_NEEDS = {
    "needs_torch_npu": ("torch_npu, installed", _HAS_TORCH_NPU),
    "needs_rich": ("the package rich", importlib.util.find_spec("rich") is not None),
    "needs_ipv6": ("the IPv6 loopback address", _has_ipv6()),
}


def pytest_configure(config: pytest.Config) -> None:
    for marker, (what, _) in _NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: the test needs {what}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, (what, available) in _NEEDS.items():
        for item in items:
            if item.get_closest_marker(marker) and not available:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    marked = [item for item in session.items if item.get_closest_marker("needs_torch_npu")]
    if marked and _HAS_TORCH_NPU:
        done = simulate("-c", "", timeout=900)
        assert done.returncode == 0, done.stderr

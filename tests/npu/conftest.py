# SPDX-License-Identifier: Apache-2.0
"""Tests of caches on NPUs, simulated or real; all of them are skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.needs_npu)


@pytest.fixture
def device() -> torch.device:
    """The NPU that ``device_id`` 0, the default, is."""
    return torch.device("npu", 0)


@pytest.fixture
def npu() -> Any:
    """``torch.npu``."""
    return torch.npu  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def tidy(npu: Any) -> Iterator[None]:
    """Gives a test's memory back to the device, so that the next one starts from nothing."""
    yield
    npu.set_device(0)
    npu.synchronize()
    npu.empty_cache()

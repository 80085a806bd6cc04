# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the transport tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transfer.conftest import here, peers, services
from tests.transports.hixl_rig import Rig

__all__ = ["here", "peers", "services"]

EXAMPLE = Path(__file__).parent / "example"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example transport of the docs is installed."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.fixture
def rig() -> Rig:
    return Rig()

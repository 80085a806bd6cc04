# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of size."""

from __future__ import annotations

from tests.faults.conftest import here, peers

__all__ = ["here", "peers"]

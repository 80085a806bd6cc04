# SPDX-License-Identifier: Apache-2.0
"""The version of this library. Instances of different versions do not link with each other."""

from __future__ import annotations

VERSION = "0.1.0"

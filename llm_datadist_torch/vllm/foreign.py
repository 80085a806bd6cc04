# SPDX-License-Identifier: Apache-2.0
"""Objects of vLLM's, where vLLM itself is not imported."""

from __future__ import annotations

from typing import Any, TypeAlias

VllmObject: TypeAlias = Any
"""An object of a class of vLLM's. What is used of it is what vLLM documents."""

# SPDX-License-Identifier: Apache-2.0
"""``llm_datadist.v2.config``: two helpers of the v1 mode, which isn't here."""

from __future__ import annotations

from typing import NoReturn

_V1_HELPERS = ("ClusterConfig", "EngineConfig")


def __getattr__(name: str) -> NoReturn:
    if name in _V1_HELPERS:
        raise ImportError(
            f"{name} belongs to the v1 mode: describe an instance by LLMConfig, a peer by"
            " LLMClusterInfo",
            name=__name__,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

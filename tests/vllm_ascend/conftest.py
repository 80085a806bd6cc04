# SPDX-License-Identifier: Apache-2.0
"""Engines of vllm-ascend on simulated NPUs, that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.conftest import MODULE, Engines
from tests.vllm.engines import make_model

# Triton's interpreter makes the profile run of longer steps slow. Prompts of more tokens are
# computed in chunks.
STEP = {"dtype": "float16", "max_num_batched_tokens": 128, "max_num_seqs": 8}
# Named alike in all, so that weights that differ are not refused.
WEIGHTS = {"weights_id": "tiny"}
PULL = {"connector": {"verify": True, "timeout_s": 60.0} | WEIGHTS, "module": MODULE} | STEP
PUSH = {"mode": "push", "verify": True} | WEIGHTS

# What each is for:
#   whole16: without a connector, what is right
#   p, d: prefix caching, chunked prefill and checksums
#   other: a producer of other weights, and then killed
#   push_p, push_d: with "push"
ENGINES: dict[str, dict[str, Any]] = {
    "whole16": {"enable_prefix_caching": False} | STEP,
    "p": PULL | {"role": "kv_producer"},
    "d": PULL | {"role": "kv_consumer"},
    "other": PULL | {"role": "kv_producer"},
    "push_p": PULL | {"role": "kv_producer", "connector": PUSH},
    # Its port is chosen when it starts.
    "push_d": PULL | {"role": "kv_consumer", "connector": PUSH | {"cluster_id": 77}},
}


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    directory = tmp_path_factory.mktemp("engines")
    other = directory / "other-model"
    make_model(other, "llama", "8")
    made = Engines(directory, ENGINES, {"other": other})
    try:
        made.start()
        yield made
    finally:
        made.close()

# SPDX-License-Identifier: Apache-2.0
"""The connector's half in the scheduler, called as vLLM calls it, with vLLM's classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, ParallelConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from llm_datadist_torch.vllm.connector import LLMDataDistConnector
from llm_datadist_torch.vllm.params import Peer, RemoteBlocks, prompt_digest
from tests.vllm.conftest import MODULE

# vLLM is imported here, and changes the environment of engines that are started later.
pytestmark = pytest.mark.thorough

PROMPT = list(range(3, 132))
OURS = {
    "kv_connector": "LLMDataDistConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": MODULE,
}
FAILED = "failed_load_tokens"


def kv_cache_config() -> Any:
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=64,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(layer_names=["layers.0"], kv_cache_spec=spec)],
    )


def config(transfer: dict[str, Any]) -> Any:
    """Of vLLM's configuration what connectors read."""
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**transfer),
        parallel_config=ParallelConfig(),
        model_config=SimpleNamespace(
            enable_sleep_mode=False, get_total_num_kv_heads=lambda: 2, max_model_len=2048
        ),
        cache_config=SimpleNamespace(block_size=32),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
    )


def request(name: str, lease: int = 1) -> Any:
    """One whose prompt a producer has."""
    remote = RemoteBlocks(
        remote_engine_id="p",
        remote_request_id=name,
        remote_lease=lease,
        remote_lease_s=60.0,
        remote_peers=(Peer(5, "127.0.0.1", 7000, "life"),),
        remote_tp_size=1,
        remote_block_ids=((1, 2, 3, 4, 5),),
        remote_num_tokens=len(PROMPT),
        prompt=prompt_digest(PROMPT, []),
    )
    return SimpleNamespace(
        request_id=name,
        prompt_token_ids=PROMPT,
        num_computed_tokens=0,
        mm_features=[],
        lora_request=None,
        kv_transfer_params=remote.to_params(),
        status=RequestStatus.WAITING,
    )


def blocks(*numbers: int) -> KVCacheBlocks:
    return KVCacheBlocks(([KVCacheBlock(number) for number in numbers],))


def scheduled(connector: Any, asked: Any, *numbers: int) -> tuple[int, Any]:
    """Do with a new request what vLLM does: tokens that are loaded, and the step's plan."""
    connector.on_new_request(asked)
    matched, asynchronous = connector.get_num_new_matched_tokens(asked, 0)
    assert asynchronous
    connector.update_state_after_alloc(asked, blocks(*numbers), matched)
    nothing = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=SimpleNamespace())
    nothing.scheduled_cached_reqs.resumed_req_ids = set()
    nothing.scheduled_cached_reqs.req_ids = []
    return matched, connector.build_connector_meta(nothing)


def several(directory: Path, *, is_first: bool) -> MultiConnector:
    """This connector before or after vLLM's example, which stores prompts in a directory."""
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(directory)},
    }
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [OURS, other] if is_first else [other, OURS],
        },
    }
    return MultiConnector(config(transfer), KVConnectorRole.SCHEDULER, kv_cache_config())


def failed_tokens(connector: Any) -> int:
    stats = connector.get_kv_connector_stats()
    return 0 if stats is None else stats.data[FAILED]


def test_tokens_of_failed_loads_are_counted() -> None:
    connector = LLMDataDistConnector(config(OURS), KVConnectorRole.SCHEDULER, kv_cache_config())
    for lease, name, first in ((1, "a", 10), (2, "b", 20)):
        numbers = tuple(range(first, first + 5))
        matched, meta = scheduled(connector, request(name, lease), *numbers)
        (pull,) = meta.step.pulls
        assert (matched, pull.local_blocks) == (129, (numbers,))
    assert connector.get_kv_connector_stats() is None
    # One worker of two says so before the last has ended.
    connector.update_connector_output(KVConnectorOutput(invalid_block_ids={13, 14}))
    connector.update_connector_output(KVConnectorOutput(finished_recving={"a", "b"}))
    assert failed_tokens(connector) == 129
    connector.update_connector_output(KVConnectorOutput(invalid_block_ids={20}))
    assert connector.get_kv_connector_stats() is None


@pytest.mark.parametrize("is_first", [True, False])
def test_one_of_several_connectors(tmp_path: Path, is_first: bool) -> None:
    """vLLM's MultiConnector takes it before and after another that has nothing."""
    connector = several(tmp_path, is_first=is_first)
    at = 0 if is_first else 1
    asked = request("a")
    matched, meta = scheduled(connector, asked, 10, 11, 12, 13, 14)
    (pull,) = meta.metadata[at].step.pulls
    assert (matched, pull.num_tokens) == (129, 129)
    connector.update_connector_output(
        KVConnectorOutput(invalid_block_ids={12}, finished_recving={"a"})
    )
    stats = connector.get_kv_connector_stats()
    assert stats.data["LLMDataDistConnector"].data[FAILED] == 129
    asked.status = RequestStatus.FINISHED_ABORTED
    assert connector.request_finished(asked, [10, 11, 12, 13, 14]) == (False, None)


@pytest.mark.parametrize("is_first", [True, False])
def test_what_another_connector_has_is_not_loaded(tmp_path: Path, is_first: bool) -> None:
    """The first of them that has the prompt loads it; this one then gives its blocks back."""
    connector = several(tmp_path, is_first=is_first)
    ours, example = connector.sub_connectors if is_first else connector.sub_connectors[::-1]
    example._found_match_for_prompt = lambda tokens, hashes: True  # type: ignore[attr-defined]
    asked = request("a")
    connector.on_new_request(asked)
    matched, asynchronous = connector.get_num_new_matched_tokens(asked, 0)
    assert (matched, asynchronous) == ((129, True) if is_first else (96, False))
    connector.update_state_after_alloc(asked, blocks(10, 11, 12, 13, 14), matched)
    step = ours._scheduler.take_step()  # type: ignore[attr-defined]
    (pull,) = step.pulls
    assert pull.awaited == is_first
    assert bool(pull.local_blocks) == is_first

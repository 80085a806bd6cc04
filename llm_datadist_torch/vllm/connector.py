# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDistConnector``: a KV connector for vLLM's V1 engine over this library.

Use it by ``--kv-transfer-config '{"kv_connector": "LLMDataDistConnector", "kv_role": "kv_both"}'``,
with ``"kv_connector_module_path": "llm_datadist_torch.vllm.connector"`` where plugins are not
loaded. Its settings are in :mod:`llm_datadist_torch.vllm.settings`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.request import RequestStatus

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.fingerprint import Fingerprint, digest_of
from llm_datadist_torch.vllm.layouts import describe
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.push_scheduling import PushScheduler
from llm_datadist_torch.vllm.scheduling import PullScheduler
from llm_datadist_torch.vllm.settings import PUSH, Settings
from llm_datadist_torch.vllm.steps import Step
from llm_datadist_torch.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("llm_datadist_torch")

_COMPLETED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's plan, on its way to the workers."""

    step: Step


@dataclass
class WorkerAddress(KVConnectorHandshakeMetadata):
    """Where one worker can be reached, on its way to the scheduler."""

    peer: Peer
    digest: str


class LLMDataDistConnector(KVConnectorBase_V1):
    """Hands over KV caches between engines; see the module.

    One object lives in the scheduler and one in each worker. No hook blocks: whatever waits for
    others does so in threads of its own.

    It is no ``SupportsHMA``: with several cache groups layers share memory under different block
    tables, and a failed load can't be told by block ids. vLLM then manages one group.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._settings = Settings.of(transfer.kv_connector_extra_config)
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise param_error(
                f"the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups, only one"
                " can be handed over"
            )
        self._scheduler: PullScheduler | PushScheduler | None = None
        self._worker: WorkerHalf | None = None
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            serves, takes = transfer.is_kv_producer, transfer.is_kv_consumer
            if self._settings.mode == PUSH:
                block_size = vllm_config.cache_config.block_size
                self._scheduler = PushScheduler(block_size, sends=serves, receives=takes)
            else:
                self._scheduler = PullScheduler(transfer.engine_id, serves=serves, pulls=takes)

    # -- scheduler --------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """The workers are up: this is where peers reach them."""
        workers = [metadata[rank] for rank in sorted(metadata)]
        self._scheduler_half().set_workers([each.peer for each in workers], workers[0].digest)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that a producer has for this request, to be loaded between steps.

        None: vLLM asks again in the next step.
        """
        matched = self._scheduler_half().num_matched(request, num_computed_tokens)
        return matched, bool(matched)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks."""
        self._scheduler_half().allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers are told in this step."""
        return StepMetadata(self._scheduler_half().take_step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have said in this step."""
        self._scheduler_half().loaded(connector_output.finished_recving or ())

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks are kept, and what the client is told."""
        return self._scheduler_half().finished(
            request, block_ids, completed=request.status in _COMPLETED
        )

    # -- worker -----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start this worker's instance, on vLLM's own tensors."""
        config = self._vllm_config
        fingerprint = fingerprint_of(config)
        layout, groups = describe(
            kv_caches,
            block_size=config.cache_config.block_size,
            tp_rank=get_tensor_model_parallel_rank(),
            tp_size=config.parallel_config.tensor_parallel_size,
            total_kv_heads=config.model_config.get_total_num_kv_heads(),
            arrangement=fingerprint.kernel,
        )
        self._worker = WorkerHalf(self._settings, fingerprint, layout, groups)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Where this worker can be reached."""
        worker = self._worker_half()
        return WorkerAddress(worker.address, worker.digest)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.before_compute(connector_metadata.step)

    def start_load_kv(self, forward_context: object, **kwargs: object) -> None:  # noqa: ARG002
        """Begin what the scheduler wants, in the background."""
        metadata = self._get_connector_metadata()
        if self._worker is not None and isinstance(metadata, StepMetadata):
            self._worker.step(metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are done before the request is scheduled."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: object,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """With "push" the layer is sent, in the background; else blocks are served in place."""
        if self._worker is not None:
            self._worker.layer_done(layer_name, kv_layer)

    def wait_for_save(self) -> None:
        """Nothing: the blocks are kept until they have been read or sent."""

    def get_finished(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks may be freed, and requests whose blocks have been loaded."""
        if self._worker is None:
            return None, None
        sent, received, failed = self._worker.take_done()
        self._failed_blocks = failed
        return sent, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded, of requests that ``get_finished`` has just named."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        """End the worker's instance."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    # -- both -------------------------------------------------------------------------------------

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """With "push" a whole graph would leave no moment to send a layer in."""
        return extra_config.get("mode") == PUSH

    def _scheduler_half(self) -> PullScheduler | PushScheduler:
        if self._scheduler is None:
            raise RuntimeError("this is the worker's half of the connector")
        return self._scheduler

    def _worker_half(self) -> WorkerHalf:
        if self._worker is None:
            raise RuntimeError("register_kv_caches has not been called")
        return self._worker


def fingerprint_of(config: VllmConfig) -> Fingerprint:
    """What peers must have in common with an engine of this configuration."""
    model = config.model_config
    facts = {
        name: value
        for name, value in model.hf_config.to_dict().items()
        # These say where it came from and what wrote it.
        if name not in ("_name_or_path", "transformers_version")
    }
    return Fingerprint(
        vllm=vllm.__version__,
        model=f"{PurePath(model.model).name}@{model.revision or ''}",
        config=digest_of(repr(sorted(facts.items())), repr(model.quantization)),
        dtype=str(model.dtype),
        kv_dtype=str(config.cache_config.cache_dtype),
        kernel=_kernel_of(config),
    )


def _kernel_of(config: VllmConfig) -> str:
    """The backend, and on CPUs the instructions that the KV is arranged for."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"{current_platform.device_name}/{config.attention_config.backend}"
    from vllm.v1.attention.backends import cpu_attn

    model = config.model_config
    isa = cpu_attn._get_attn_isa(  # noqa: SLF001
        model.dtype,
        config.cache_config.block_size,
        model.get_head_size(),
        config.cache_config.cache_dtype,
    )
    return f"cpu/{isa}"

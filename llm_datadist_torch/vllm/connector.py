# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDistConnector``: a KV connector for vLLM's V1 engine over this library.

Use it by ``--kv-transfer-config '{"kv_connector": "LLMDataDistConnector", "kv_role": "kv_both"}'``,
with ``"kv_connector_module_path": "llm_datadist_torch.vllm.connector"`` where plugins are not
loaded. Its settings are in :mod:`llm_datadist_torch.vllm.settings`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.request import RequestStatus

from llm_datadist_torch.vllm import facts
from llm_datadist_torch.vllm.compat.failed_loads import (
    BY_REQUEST,
    GroupSupport,
    failed_requests,
    transfer_results,
)
from llm_datadist_torch.vllm.compat.hit_sources import FROM_PEERS
from llm_datadist_torch.vllm.compat.sleep import TOLD_OF_SLEEP
from llm_datadist_torch.vllm.compat.transfer_groups import transfer_group_ids
from llm_datadist_torch.vllm.foreign import VllmObject
from llm_datadist_torch.vllm.layouts import Kind, describe
from llm_datadist_torch.vllm.metrics import ConnectorMetrics, ConnectorStats
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.params import BlockIds, Peer
from llm_datadist_torch.vllm.scheduler.external_hits import ExternalHits
from llm_datadist_torch.vllm.scheduler.prompts import Prompts
from llm_datadist_torch.vllm.scheduler.pull import PullScheduler
from llm_datadist_torch.vllm.scheduler.push import PushScheduler
from llm_datadist_torch.vllm.settings import PUSH
from llm_datadist_torch.vllm.steps import Step
from llm_datadist_torch.vllm.worker.half import WorkerHalf
from llm_datadist_torch.vllm.worker.pulling import Done

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


@dataclass
class WorkerNews(KVConnectorWorkerMetadata):
    """What the scheduler's half hears from the workers' besides what is done.

    Attributes:
        lost: Queued requests whose producers have given up their blocks.
        peers: Workers that are reached elsewhere now, by (stage, rank).
    """

    lost: set[str] = field(default_factory=set)
    peers: dict[tuple[int, int], Peer] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of two workers."""
        return WorkerNews(self.lost | other.lost, self.peers | other.peers)


class LLMDataDistConnector(KVConnectorBase_V1, GroupSupport):
    """Hands over KV caches between engines; see the module.

    One object lives in the scheduler and one in each worker. No hook blocks: whatever waits for
    others does so in threads of its own.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, parallel = self._kv_transfer_config, vllm_config.parallel_config
        facts.check_axes(parallel)
        facts.check_sleep(vllm_config.model_config, told=TOLD_OF_SLEEP)
        self._settings = facts.settings_of(transfer)
        self._group_ids = transfer_group_ids(kv_cache_config)
        self._groups = facts.group_specs(
            kv_cache_config,
            self._group_ids,
            vllm_config.model_config.get_total_num_kv_heads(),
            parallel.tensor_parallel_size,
        )
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        self._scheduler: PullScheduler | PushScheduler | None = None
        self._workers: dict[tuple[int, int], Peer] = {}
        self._worker: WorkerHalf | None = None
        # The handshake says where workers are; where MultiConnector does not pass it on, they do.
        self._moved = True
        self._record = Record()
        self._hits = ExternalHits(self._record)
        self._failed: dict[str, set[int]] = {}
        self._left = Done()
        # The state after a token can't be taken back, and the last token is computed at both ends.
        self._back_off = int(any(group.layout.kind is Kind.STATE for group in self._groups))
        if role == KVConnectorRole.SCHEDULER:
            prompts = Prompts(facts.Adapters().name, self._back_off)
            serves, takes = transfer.is_kv_producer, transfer.is_kv_consumer
            if self._settings.mode == PUSH:
                self._scheduler = PushScheduler(prompts, sends=serves, receives=takes)
            else:
                self._scheduler = PullScheduler(
                    transfer.engine_id, self._settings.lease_s, prompts, serves=serves, pulls=takes
                )

    # -- scheduler --------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The workers are up: this is where peers reach them, by (stage, rank)."""
        self._set_workers(_addresses(metadata))

    def set_xfer_handshake_metadata(
        self, metadata: Mapping[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """The same of an engine of one stage."""
        self._set_workers(_addresses({(0, rank): each for rank, each in metadata.items()}))

    def _set_workers(self, peers: Mapping[tuple[int, int], Peer]) -> None:
        self._workers |= peers
        ordered = [self._workers[where] for where in sorted(self._workers)]
        size = self._vllm_config.parallel_config.tensor_parallel_size
        self._scheduler_half().set_workers(ordered, size)

    def on_new_request(self, request: Request) -> None:
        """A request waits for its turn."""
        scheduler = self._scheduler_half()
        if self._back_off:
            scheduler.shorten(request, self._back_off)
        scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that a producer has for this request, to be loaded between steps.

        None: vLLM asks again in the next step.
        """
        matched = self._scheduler_half().num_matched(request, num_computed_tokens)
        return matched, bool(matched)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:  # noqa: ARG002
        """All groups are loaded, states too."""
        return self._group_ids

    def get_external_cache_hit_sources(
        self,
        request: Request,  # noqa: ARG002
        num_external_tokens: int,
    ) -> dict[Any, int]:
        """Whatever is loaded comes from peers. Asked before it is, like vLLM's other counts."""
        return {FROM_PEERS: num_external_tokens} if num_external_tokens else {}

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has its blocks."""
        transferred = self._transferred(blocks.get_block_ids())
        self._scheduler_half().allocated(request, transferred, num_external_tokens)
        self._hits.allocated(request.request_id, transferred, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers are told in this step."""
        return StepMetadata(self._scheduler_half().take_step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have said in this step."""
        scheduler, received = self._scheduler_half(), connector_output.finished_recving or ()
        self._hits.failed(failed_requests(connector_output), connector_output.invalid_block_ids)
        self._hits.ended(received)
        scheduler.loaded(received)
        news = connector_output.kv_connector_worker_meta
        if isinstance(news, WorkerNews):
            scheduler.lost(news.lost)
            if news.peers:
                self._set_workers(news.peers)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks are kept, and what the client is told."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same with several groups."""
        self._hits.ended([request.request_id])
        return self._scheduler_half().finished(
            request, self._transferred(block_ids), completed=request.status in _COMPLETED
        )

    def reset_cache(self) -> bool:
        """What is kept for peers may be of other weights now: nothing is kept any more."""
        self._scheduler_half().reset()
        return True

    def _transferred(self, block_ids: tuple[list[int], ...]) -> BlockIds:
        """The blocks of the groups that are handed over."""
        return tuple(tuple(block_ids[group_id]) for group_id in self._group_ids)

    # -- worker -----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start this worker's instance, on vLLM's own tensors."""
        config = self._vllm_config
        parallel = config.parallel_config
        stage, rank = get_pp_group().rank_in_group, get_tp_group().rank_in_group
        from vllm.platforms import current_platform

        platform = facts.platform_name(current_platform, _device_name(current_platform))
        fingerprint = facts.fingerprint_of(
            config,
            self._settings,
            version=vllm.__version__,
            platform=platform,
            kernel=_kernel_of(config),
        )
        layout, caches = describe(
            kv_caches,
            self._groups,
            arrangement=fingerprint.kernel,
            num_blocks=self._kv_cache_config.num_blocks,
            tp_rank=rank,
            tp_size=parallel.tensor_parallel_size,
            pp_rank=stage,
            pp_size=parallel.pipeline_parallel_size,
        )
        self._where = stage, rank
        self._worker = WorkerHalf(
            self._settings,
            fingerprint,
            layout,
            caches,
            rank=facts.worker_rank(parallel, stage, rank),
        )

    def unregister_kv_caches(self) -> None:
        """The KV's memory goes away: peers must not read it, and nothing of theirs is awaited."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
            # The engine still waits for what has ended by this.
            self._left.add(worker.take_done())

    def restore_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV's memory is back: a new life begins, in which nothing is kept for anybody."""
        self.register_kv_caches(kv_caches)
        self._moved = True

    @property
    def supports_sleep_mode(self) -> bool:
        """Drop the KV's memory when vLLM asks for it."""
        return True

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Where this worker can be reached."""
        return WorkerAddress(self._worker_half().address)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Blocks of preempted requests are about to be overwritten."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.preempted(kv_connector_metadata.step)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.before_compute(connector_metadata.step)

    def start_load_kv(self, forward_context: object, **kwargs: object) -> None:  # noqa: ARG002
        """Begin what the scheduler wants, in the background."""
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, StepMetadata):
            return
        if self._worker is not None:
            self._worker.step(metadata.step)
        else:
            # The KV's memory is away.
            self._left.add(Done.without_caches(metadata.step))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are done before the request is scheduled."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: object,  # noqa: ARG002
        attn_metadata: object,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """With "push" the layer is sent, in the background; else blocks are served in place."""
        if self._worker is not None:
            self._worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """The step has been launched. The blocks are kept until they have been read or sent."""
        if self._worker is not None:
            self._worker.step_done()

    def get_finished(
        self,
        finished_req_ids: set[str],  # noqa: ARG002
    ) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks may be freed, and requests whose blocks have been loaded."""
        done, self._left = self._left, Done()
        if self._worker is not None:
            done.add(self._worker.take_done())
        self._failed = done.failed
        return done.sent, done.received

    def get_transfer_results(self, finished_req_ids: set[str]) -> VllmObject:
        """The same, and with several groups the requests whose loads failed."""
        sent, received = self.get_finished(finished_req_ids)
        failed = set() if self._one_group else set(self._failed)
        return transfer_results(sent or set(), received or set(), failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded, of requests that were named just now."""
        failed, self._failed = self._failed, {}
        if BY_REQUEST and not self._one_group:
            return set()
        return set().union(*failed.values())

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """What was counted since the last call."""
        worker = self._worker
        stats = ConnectorStats(data=worker.take_counts() if worker else self._record.take())
        return None if stats.is_empty() else stats

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's half must hear."""
        if self._worker is None:
            return None
        lost, moved = self._worker.take_lost(), self._moved
        self._moved = False
        if not lost and not moved:
            return None
        return WorkerNews(lost, {self._where: self._worker.address} if moved else {})

    def shutdown(self) -> None:
        """End the worker's instance."""
        self.unregister_kv_caches()

    # -- both -------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Counts, as they come from the workers."""
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: VllmObject,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorMetrics:
        """Counts as Prometheus metrics."""
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

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


def _addresses(
    metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata],
) -> dict[tuple[int, int], Peer]:
    """Where workers can be reached; MultiConnector passes on what one of its connectors said."""
    found = {
        where: each.peer for where, each in metadata.items() if isinstance(each, WorkerAddress)
    }
    if len(found) != len(metadata):
        logger.warning(
            "another connector's handshake was passed on in place of this one's: no peer can reach"
            " this engine's blocks before its first step is done. Put LLMDataDistConnector before"
            " connectors that have a handshake of their own."
        )
    return found


def _device_name(platform: VllmObject) -> str:
    return "cpu" if platform.is_cpu() else str(platform.get_device_name())


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

# SPDX-License-Identifier: Apache-2.0
"""vLLM's OffloadingConnector on a CPU: its own copies want a GPU, these are torch's.

Named by ``spec_name`` and ``spec_module_path`` of ``kv_connector_extra_config``. Which blocks are
stored, found and loaded is decided by vLLM.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies whole blocks while the engine waits.

    Args:
        kv_caches: The engine's blocks.
        num_chunks: Blocks that can be stored.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        caches = [each.tensor for each in kv_caches.tensors]
        self._pairs = [(each, each.new_zeros(num_chunks, each.shape[1])) for each in caches]
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec
    ) -> bool:
        src, dst = torch.from_numpy(src_spec.block_ids), torch.from_numpy(dst_spec.block_ids)
        for cache, stored in self._pairs:
            stored[dst.long()] = cache[src.long()]
        return self._done(job_id, len(src))

    def submit_load(
        self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        src, dst = torch.from_numpy(src_spec.block_ids), torch.from_numpy(dst_spec.block_ids)
        for cache, stored in self._pairs:
            cache[dst.long()] = stored[src.long()]
        return self._done(job_id, len(src))

    def _done(self, job_id: int, count: int) -> bool:
        nbytes = sum(cache.shape[1] for cache, _ in self._pairs) * count
        self._finished.append(TransferResult(job_id, True, nbytes, 1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: all copies are done."""


class HostOffloadingSpec(CPUOffloadingSpec):
    """What vLLM makes the worker with."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return HostWorker(kv_caches, self.num_chunks)

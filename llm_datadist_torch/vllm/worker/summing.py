# SPDX-License-Identifier: Apache-2.0
"""Checksums of rows for peers, computed in the background."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial

import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.vllm.protocol import Checksums
from llm_datadist_torch.vllm.worker.service import WorkerService

MAX_SUMS = 256
"""Answers with checksums that wait to be fetched."""


class Summing:
    """Computes checksums that peers ask for until they are there.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        service: This worker's instance.
    """

    def __init__(self, service: WorkerService) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._sums: OrderedDict[tuple[int, Checksums], list[int] | None] = OrderedDict()

    def answer(self, peer: int, question: Checksums) -> list[int] | None:
        """Checksums that have been computed; else have that done.

        Raises:
            LLMParamError: There are no such rows.
        """
        key = peer, question
        with self._lock:
            if key in self._sums:
                sums = self._sums[key]
                if sums is not None:
                    del self._sums[key]
                return sums
        rows, layers = self._checked(question)
        with self._lock:
            self._sums[key] = None
            while len(self._sums) > MAX_SUMS:
                self._sums.popitem(last=False)
        job = partial(self._compute, key, question.cache, rows, layers)
        self._service.lanes.submit(("sums", peer), job)
        return None

    def _compute(
        self, key: tuple[int, Checksums], cache: int, rows: torch.Tensor, layers: range
    ) -> None:
        sums = self._service.checksums(cache, rows, layers)
        with self._lock:
            if key in self._sums:
                self._sums[key] = sums

    def _checked(self, question: Checksums) -> tuple[torch.Tensor, range]:
        caches, (first, stop) = self._service.caches, question.layers
        if not 0 <= question.cache < len(caches) or len(question.rows) % 8:
            raise param_error(f"there are no such rows of cache {question.cache}")
        tensors = caches[question.cache].tensors
        if not 0 <= first < stop <= len(tensors):
            raise param_error(f"cache {question.cache} has no layers [{first}, {stop})")
        rows = torch.frombuffer(bytearray(question.rows), dtype=torch.int64)
        num_rows = tensors[0].shape[0]
        if bool(((rows < 0) | (rows >= num_rows)).any()):
            raise param_error(f"rows of cache {question.cache} are out of range [0, {num_rows})")
        return rows, range(first, stop)

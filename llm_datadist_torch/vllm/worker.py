# SPDX-License-Identifier: Apache-2.0
"""The worker's half of the connector: serves its blocks, and fetches those of others."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

import msgspec
import torch

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.links.events import LinkEvent
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from llm_datadist_torch.vllm.fingerprint import Fingerprint, digest_of
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.leases import Leases, lease_number_now
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import (
    Checksums,
    Claim,
    Describe,
    Description,
    Release,
    Sums,
    Verdict,
    Where,
    decode_question,
    encode,
)
from llm_datadist_torch.vllm.pulling import Puller
from llm_datadist_torch.vllm.pushing import Sender
from llm_datadist_torch.vllm.receiving import Receiver
from llm_datadist_torch.vllm.service import WorkerService
from llm_datadist_torch.vllm.settings import PUSH, Settings
from llm_datadist_torch.vllm.steps import Step
from llm_datadist_torch.work import Work
from llm_datadist_torch.workers import WorkerPool

logger = logging.getLogger("llm_datadist_torch")

_MAX_SUMS = 256
"""Answers with checksums that wait to be fetched."""


class WorkerHalf:
    """What the connector does in a worker.

    Thread safety: all but ``close`` are called by the engine's loop, and don't block. Peers'
    questions come from the library's thread.

    Args:
        settings: The connector's settings.
        fingerprint: What peers must have in common with it.
        layout: This worker's KV.
        groups: Its tensors; see :class:`~.service.WorkerService`.

    Raises:
        LLMException: It can't listen, or the tensors can't be registered.
    """

    def __init__(
        self,
        settings: Settings,
        fingerprint: Fingerprint,
        layout: KVLayout,
        groups: list[list[torch.Tensor]],
    ) -> None:
        self._layout = layout
        self._described = encode(Description(fingerprint, layout))
        self._settings = settings
        self.leases = Leases(settings.lease_s, after=lease_number_now())
        self._service = WorkerService(settings, layout.tp_rank, groups)
        self.digest = digest_of(fingerprint, layout_digest(layout))
        self.puller = Puller(self._service, settings, fingerprint, layout, self.digest)
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        if settings.mode == PUSH:
            pages = len(layout.parts)
            self._sender = Sender(
                self._service,
                settings,
                layout.tp_rank,
                pages,
                layout.layers,
                layout.block_size,
                self.digest,
            )
            self._receiver = Receiver(
                self._service, settings, groups[:pages], layout.block_size, self.digest
            )
        self._sums_lock = threading.Lock()
        self._sums: OrderedDict[tuple[int, Checksums], list[int] | None] = OrderedDict()
        self._summing = WorkerPool("vllm-sums", 1)
        self._service.datadist.on_question(self._answer)
        self._service.datadist.on_link_event(self._on_link_event)

    @property
    def address(self) -> Peer:
        """How peers find it."""
        return self._service.address

    def before_compute(self, step: Step) -> None:
        """What must be known before the step computes."""
        if self._sender is not None:
            self._sender.step(step.pushes, step.push_ends)

    def layer_done(self, name: str, tensor: torch.Tensor) -> None:
        """The step has computed, or launched, a layer."""
        if self._sender is not None:
            self._sender.layer_done(name, tensor)

    def step(self, step: Step) -> None:
        """Begin what the scheduler wants."""
        for grant in step.grants:
            self.leases.grant(grant.number, grant.request_id, grant.blocks)
        for pull in step.pulls:
            self.puller.start(pull)
        if self._receiver is not None:
            for expect in step.expects:
                self._receiver.expect(expect)

    def take_done(self) -> tuple[set[str], set[str], set[int]]:
        """What is done since the last call.

        Returns:
            Requests whose blocks need not be kept any more, requests whose blocks have been
            fetched or could not be, and the local blocks that could not.
        """
        received, failed_blocks = self.puller.take_done()
        sent = self.leases.take_finished()
        if self._sender is not None and self._receiver is not None:
            sent |= self._sender.take_done()
            more, wrong = self._receiver.take_done()
            received |= more
            failed_blocks |= wrong
        return sent, received, failed_blocks

    def close(self) -> None:
        """End everything. Waits for what moves bytes. Idempotent."""
        self.puller.close()
        if self._sender is not None and self._receiver is not None:
            self._sender.close()
            self._receiver.close()
        self._summing.close(Deadline.after_ms(self._settings.timeout_ms))
        self._service.close()

    # -- for peers --------------------------------------------------------------------------------

    def _on_link_event(self, event: LinkEvent) -> None:
        if event.kind in ("lost", "unlinked"):
            self.leases.peer_gone(event.peer)
            if self._receiver is not None:
                self._receiver.peer_gone(event.peer)
        if event.kind == "lost":
            self._service.forget(event.peer)

    def _answer(self, peer: int, payload: bytes) -> bytes:
        question = decode_question(payload)
        if isinstance(question, Describe):
            return self._described
        if isinstance(question, Claim):
            return encode(Verdict(self.leases.claim(question.lease, peer, question.readers)))
        if isinstance(question, Release):
            return encode(Verdict(self.leases.release(question.lease, peer)))
        if isinstance(question, Checksums):
            return encode(Sums(self._checksums(peer, question)))
        if self._receiver is None:
            raise param_error(
                "this engine takes no pushes", remedy='set "mode": "push" at both ends.'
            )
        if isinstance(question, Where):
            return encode(self._receiver.where(peer, question.transfer_id))
        return encode(Verdict(self._receiver.pushed(peer, question)))

    def _checksums(self, peer: int, question: Checksums) -> list[int] | None:
        """Checksums that have been computed; else have that done in the background."""
        key = peer, question
        with self._sums_lock:
            if key in self._sums:
                sums = self._sums[key]
                if sums is not None:
                    del self._sums[key]
                return sums
        rows = self._checked_rows(question)
        with self._sums_lock:
            self._sums[key] = None
            while len(self._sums) > _MAX_SUMS:
                self._sums.popitem(last=False)

        def job(work: Work) -> None:
            with work.step(0):
                sums = self._service.checksums(question.group, rows)
            with self._sums_lock:
                if key in self._sums:
                    self._sums[key] = sums
            work.succeed(0)

        self._summing.submit(Work(job, 1))
        return None

    def _checked_rows(self, question: Checksums) -> torch.Tensor:
        if self.leases.blocks(question.lease) is None:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"the blocks of lease {question.lease} have been given up, or never were kept",
            )
        if not 0 <= question.group < len(self._service.caches) or len(question.rows) % 8:
            raise param_error(f"there are no such rows of group {question.group}")
        rows = torch.frombuffer(bytearray(question.rows), dtype=torch.int64)
        num_rows = self._service.caches[question.group].tensors[0].shape[0]
        if bool(((rows < 0) | (rows >= num_rows)).any()):
            raise param_error(f"rows of group {question.group} are out of range [0, {num_rows})")
        return rows


def layout_digest(layout: KVLayout) -> str:
    """Digest of what must be equal to move whole blocks between two workers of one rank."""
    return digest_of(msgspec.structs.replace(layout, num_blocks=0, tp_rank=0))

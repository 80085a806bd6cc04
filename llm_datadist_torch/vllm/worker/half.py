# SPDX-License-Identifier: Apache-2.0
"""What the connector does in a worker: serves its blocks, and fetches those of others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from llm_datadist_torch.links.events import LinkEvent
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from llm_datadist_torch.vllm import observing
from llm_datadist_torch.vllm.fingerprint import Fingerprint, digest_of
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import (
    Asked,
    Checksums,
    Claim,
    Describe,
    Description,
    PushedSums,
    Release,
    Stop,
    Sums,
    Verdict,
    Verdicts,
    Where,
    decode_question,
    encode,
)
from llm_datadist_torch.vllm.settings import PUSH, Settings
from llm_datadist_torch.vllm.steps import Step
from llm_datadist_torch.vllm.worker.leases import Leases
from llm_datadist_torch.vllm.worker.pulling import Done, Puller
from llm_datadist_torch.vllm.worker.pushing import Sender
from llm_datadist_torch.vllm.worker.receiving import Receiver
from llm_datadist_torch.vllm.worker.renewing import Renewer
from llm_datadist_torch.vllm.worker.service import WorkerService
from llm_datadist_torch.vllm.worker.summing import Summing

logger = logging.getLogger("llm_datadist_torch")


class WorkerHalf:
    """What the connector does in a worker.

    Thread safety: all but ``close`` are called by the engine's loop, and don't block. Peers'
    questions come from the library's thread.

    Args:
        settings: The connector's settings.
        fingerprint: What peers must have in common with it.
        layout: This worker's KV.
        caches: Its tensors; see :class:`~.service.WorkerService`.
        rank: Of the worker among all of its engine; None: its tensor-parallel rank.

    Raises:
        LLMException: It can't listen, or the tensors can't be registered.
    """

    def __init__(
        self,
        settings: Settings,
        fingerprint: Fingerprint,
        layout: KVLayout,
        caches: Sequence[Sequence[torch.Tensor]],
        rank: int | None = None,
    ) -> None:
        self._settings = settings
        self.leases = Leases(settings.lease_s, settings.claim_s)
        self.record = Record()
        rank = layout.tp_rank if rank is None else rank
        self._service = WorkerService(settings, settings.at_rank(rank), caches)
        self._described = encode(Description(self._service.life, fingerprint, layout))
        self.puller = Puller(self._service, settings, fingerprint, layout, self.leases, self.record)
        self.renewer = Renewer(self._service, settings, self.puller)
        self._summing = Summing(self._service)
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        if settings.mode == PUSH:
            digest = digest_of(fingerprint, layout_digest(layout))
            device, pages = caches[0][0].device, caches[: len(layout.parts)]
            in_engine = layout.pp_rank * layout.tp_size + layout.tp_rank
            self._sender = Sender(self._service, settings, in_engine, layout, device, digest)
            self._receiver = Receiver(self._service, settings, layout, pages, digest, self.record)
        self._service.datadist.on_request(self._answer)
        self._service.datadist.on_link_event(self._on_link_event)

    @property
    def address(self) -> Peer:
        """How peers find it."""
        return self._service.address

    def preempted(self, step: Step) -> None:
        """Blocks of preempted requests are about to be overwritten."""
        if self._sender is not None:
            self._sender.preempted(step.preempted)

    def before_compute(self, step: Step) -> None:
        """What must be known before the step computes."""
        if self._sender is not None:
            self._sender.step(step.pushes, step.push_ends)

    def layer_done(self, name: str) -> None:
        """The step has computed, or launched, a layer."""
        if self._sender is not None:
            self._sender.layer_done(name)

    def step_done(self) -> None:
        """The step has computed, or launched, all of its layers."""
        if self._sender is not None:
            self._sender.step_done()

    def step(self, step: Step) -> None:
        """Begin what the scheduler wants."""
        if step.reset:
            self.leases.end_all("the engine's caches have been reset")
        for grant in step.grants:
            self.leases.grant(grant.number, grant.request_id, grant.blocks)
        for renewal in step.renewals:
            self.renewer.keep(renewal)
        for pull in step.pulls:
            self.puller.start(pull)
            self.renewer.drop(pull.request_id)
        for request_id in step.drops:
            self.renewer.drop(request_id)
        if self._receiver is not None:
            for expect in step.expects:
                self._receiver.expect(expect)

    def take_done(self) -> Done:
        """What is done since the last call."""
        done = self.puller.take_done()
        finished = self.leases.take_finished()
        expired = self.leases.take_num_expired()
        num_sent = len(finished) - expired
        done.sent |= finished
        if self._sender is not None and self._receiver is not None:
            done.sent |= self._sender.take_done()
            done.add(self._receiver.take_done())
            num_sent += self._sender.take_num_sent()
        self.record.count(observing.EXPIRED, expired)
        self.record.count(observing.SENT, max(0, num_sent))
        return done

    def take_lost(self) -> set[str]:
        """Queued requests whose producers have given up their blocks, since the last call."""
        lost = self.renewer.take_lost()
        self.record.count(observing.LOST, len(lost))
        return lost

    def take_counts(self) -> dict[str, Any]:
        """What was counted since the last call; see :mod:`..observing`."""
        return self.record.take()

    def close(self) -> None:
        """End everything; what the engine still waits for has failed, or is not kept any more.

        Waits for what moves bytes. Idempotent; :meth:`take_done` may be called afterwards.
        """
        self.leases.end_all("the worker drops its caches")
        self._service.close(self._settings.timeout_s)
        self.puller.end_all()
        if self._sender is not None and self._receiver is not None:
            self._sender.end_all()
            self._receiver.end_all()

    # -- for peers --------------------------------------------------------------------------------

    def _on_link_event(self, event: LinkEvent) -> None:
        gone = event.kind in ("lost", "unlinked")
        self._service.link_changed(event.peer, lost=event.kind == "lost")
        if not gone:
            return
        self.leases.peer_gone(event.peer)
        if self._sender is not None and self._receiver is not None:
            self._sender.peer_gone(event.peer)
            self._receiver.peer_gone(event.peer)

    def _answer(self, peer: int, payload: bytes) -> bytes:
        return self._described_or(peer, decode_question(payload))

    def _described_or(self, peer: int, question: Asked) -> bytes:
        if isinstance(question, Describe):
            return self._described
        if isinstance(question, (Claim, Release, Checksums)):
            return encode(self._of_leases(peer, question))
        if self._sender is None or self._receiver is None:
            raise param_error(
                "this engine takes no pushes", remedy='set "mode": "push" at both ends.'
            )
        if isinstance(question, Where):
            return encode(self._receiver.where(question))
        if isinstance(question, PushedSums):
            return encode(Verdict(self._receiver.sums(question)))
        if isinstance(question, Stop):
            # Of another life nothing is known here.
            mine = question.life == self._service.life
            return encode(Verdict(self._sender.has_stopped(question.transfer_id) if mine else None))
        return encode(Verdict(self._receiver.pushed(question)))

    def _of_leases(
        self, peer: int, question: Claim | Release | Checksums
    ) -> Verdicts | Verdict | Sums:
        mine = question.life == self._service.life
        if isinstance(question, Claim):
            if not mine:
                return Verdicts((False,) * len(question.leases))
            return Verdicts(self.leases.claim(question.leases, peer, question.readers))
        if isinstance(question, Release):
            held = self.leases.release(question.lease, peer, question.readers) if mine else False
            return Verdict(held)
        if not mine or not self.leases.still_valid(question.lease):
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"the blocks of lease {question.lease} have been given up, or never were kept",
            )
        return Sums(self._summing.answer(peer, question))


def layout_digest(layout: KVLayout) -> str:
    """Digest of what must be equal to move whole blocks between two workers of one rank."""
    return digest_of(msgspec.structs.replace(layout, tp_rank=0))

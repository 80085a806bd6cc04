# SPDX-License-Identifier: Apache-2.0
"""The producer's side in a worker with "push": layers go out while the next ones are computed."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import Place, Pushed, Verdict, Where, encode
from llm_datadist_torch.vllm.service import WorkerService, over_layers
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Push, PushEnd
from llm_datadist_torch.work import Work
from llm_datadist_torch.workers import WorkerPool

logger = logging.getLogger("llm_datadist_torch")

_WHERE_RETRY_S = 0.005


@dataclass(frozen=True)
class _Layer:
    """One layer of one step's blocks; ``ready`` is its event, None where compute is synchronous."""

    push: Push
    layer: int
    ready: torch.Event | None


@dataclass
class _Sending:
    """One transfer, from its first step until the engine has heard of its end.

    ``sums`` are checksums of what was sent, by group, block of the request, and layer.
    """

    request_id: str
    layers: queue.SimpleQueue[_Layer | None] = field(default_factory=queue.SimpleQueue)
    sums: dict[tuple[int, int, int], int] = field(default_factory=dict)
    ended: bool = False
    done: bool = False


class Sender:
    """Sends blocks layer by layer.

    A transfer has a thread of the pool from its first layer to its last: link, ask where to write
    until the consumer knows, write each layer when it is there, say that it is complete. A request
    that is preempted and computed again is sent again, from its first block, in the same order.

    Layers are sent by ``push_blocks`` with a layer range. ``transfer_cache_async`` would take two
    tensors for a layer, and here each layer is one tensor of each cache.

    Thread safety: ``step``, ``layer_done`` and ``take_done`` are called by the engine's loop, and
    don't block.

    Args:
        service: This worker's instance.
        settings: The connector's settings.
        rank: Of this worker: it sends to the consumer's worker of the same rank.
        num_groups: Caches of whole pages.
        layers: Names of the layers, in order.
        block_size: Tokens of a block.
        digest: What the consumer must have, too.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        rank: int,
        num_groups: int,
        layers: Sequence[str],
        block_size: int,
        digest: str,
    ) -> None:
        self._service = service
        self._settings = settings
        self._rank = rank
        self._num_groups = num_groups
        self._layers = {name: at for at, name in enumerate(layers)}
        self._block_size = block_size
        self._digest = digest
        self._pushes: list[Push] = []
        self._sendings: dict[str, _Sending] = {}
        self._closed = threading.Event()
        self._workers = WorkerPool("vllm-send", settings.threads, keep=settings.threads)
        # Apart, because those above may all be waiting for consumers.
        self._notices = WorkerPool("vllm-notices", 1, keep=1)

    def step(self, pushes: Sequence[Push], ends: Sequence[PushEnd]) -> None:
        """What the step computes, before it does; and requests that have ended."""
        self._pushes = list(pushes)
        for push in pushes:
            if push.request_id not in self._sendings:
                sending = self._sendings[push.request_id] = _Sending(push.request_id)
                self._workers.submit(Work(partial(self._run, sending, push), 1))
        for end in ends:
            if end.request_id not in self._sendings:
                self._notices.submit(Work(partial(self._give_up, end), 1))
                if not end.kept:
                    continue
                self._sendings[end.request_id] = _Sending(end.request_id, done=True)
            sending = self._sendings[end.request_id]
            sending.ended = True
            # What is still to come of a request that ended early will not.
            sending.layers.put(None)

    def layer_done(self, name: str, tensor: torch.Tensor) -> None:
        """A layer of this step has been launched (on a device), or is there."""
        for push in self._pushes:
            ready = None
            if tensor.device.type != "cpu":
                ready = torch.Event(tensor.device)
                ready.record()
            self._sendings[push.request_id].layers.put(_Layer(push, self._layers[name], ready))

    def take_done(self) -> set[str]:
        """Ended requests whose blocks need not be kept any more."""
        done = {name for name, each in self._sendings.items() if each.ended and each.done}
        for name in done:
            del self._sendings[name]
        return done

    def close(self) -> None:
        """Send nothing more."""
        self._closed.set()
        for sending in list(self._sendings.values()):
            sending.layers.put(None)
        deadline = Deadline.after_ms(self._settings.timeout_ms)
        self._workers.close(deadline)
        self._notices.close(deadline)

    # -- the jobs ---------------------------------------------------------------------------------

    def _give_up(self, end: PushEnd, work: Work) -> None:
        """A request ended before its first layer: its consumer waits for nothing."""
        try:
            with work.step(0):
                if self._rank < len(end.peers):
                    self._tell(end.peers[self._rank], Pushed(end.transfer_id, complete=False))
        except LLMException as error:
            logger.warning(
                "the consumer waits in vain for the KV of request %s: %s", end.request_id, error
            )
        work.succeed(0)

    def _tell(self, peer: Peer, pushed: Pushed) -> bool:
        """How a transfer has ended; whether the consumer has waited for it."""
        self._service.link(peer, self._settings.timeout_ms)
        answer = self._service.datadist.ask(peer[0], encode(pushed), self._settings.timeout_ms)
        return msgspec.msgpack.decode(answer, type=Verdict).held

    def _run(self, sending: _Sending, first: Push, work: Work) -> None:
        try:
            with work.step(0):
                self._send(sending, first)
        except Exception as error:
            logger.warning(
                "the KV of request %s was not pushed: %s",
                sending.request_id,
                error,
                exc_info=None if isinstance(error, LLMException) else error,
            )
        finally:
            sending.done = True
        work.succeed(0)

    def _send(self, sending: _Sending, first: Push) -> None:
        if self._rank >= len(first.peers):
            raise param_error(f"the consumer has {len(first.peers)} worker(s), none of this rank")
        peer = first.peers[self._rank]
        self._service.link(peer, self._settings.timeout_ms)
        pushed = Pushed(first.transfer_id, complete=False)
        try:
            place = self._where(peer, first)
            if place.wanted and self._layers_to(peer, place, sending):
                sums = self._sums_of(place, sending) if place.verify else ()
                pushed = Pushed(first.transfer_id, complete=True, sums=sums)
        finally:
            if not self._tell(peer, pushed) and pushed.complete:
                logger.warning("the consumer did not wait for transfer %s", first.transfer_id)

    def _where(self, peer: Peer, push: Push) -> Place:
        deadline = Deadline.after_ms(int(self._settings.lease_s * 1000))
        while True:
            answer = self._service.datadist.ask(
                peer[0], encode(Where(push.transfer_id)), self._settings.timeout_ms
            )
            place = msgspec.msgpack.decode(answer, type=Place)
            if place.known:
                break
            if deadline.expired or self._closed.wait(_WHERE_RETRY_S):
                raise error_for(
                    LLMStatusCode.LLM_TIMEOUT, f"nobody asked for transfer {push.transfer_id}"
                )
        if place.wanted and (place.prompt, place.digest) != (push.prompt, self._digest):
            what = "prompt" if place.prompt != push.prompt else "KV"
            raise param_error(f"the consumer of transfer {push.transfer_id} has another {what}")
        return place

    def _layers_to(self, peer: Peer, place: Place, sending: _Sending) -> bool:
        """Send layers as they come; whether all of the prompt has been sent."""
        left = set(self._layers.values())
        while left:
            given = sending.layers.get()
            if given is None:
                return False
            self._send_layer(peer, place, given, sending.sums)
            if given.push.last:
                left.discard(given.layer)
        return True

    def _send_layer(
        self, peer: Peer, place: Place, given: _Layer, sums: dict[tuple[int, int, int], int]
    ) -> None:
        push, wanted = given.push, self._wanted(place)
        at = slice(max(push.first_block, wanted.start), min(len(push.blocks), wanted.stop))
        if at.start >= at.stop:
            return
        if given.ready is not None:
            given.ready.synchronize()
        layers = range(given.layer, given.layer + 1)
        for group in range(self._num_groups):
            self._service.datadist.cache_manager.push_blocks(
                BlocksCacheKey(peer[0], place.model_ids[group]),
                self._service.caches[group],
                push.blocks[at],
                place.blocks[at],
                layers,
                layers,
                1,
                wait_stream=torch.cpu.current_stream(),
            )
            if place.verify:
                for index in range(at.start, at.stop):
                    sums[group, index, given.layer] = self._service.checksum(
                        group, given.layer, push.blocks[index]
                    )

    def _sums_of(self, place: Place, sending: _Sending) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(
                over_layers([sending.sums[group, index, layer] for layer in self._layers.values()])
                for index in self._wanted(place)
            )
            for group in range(self._num_groups)
        )

    def _wanted(self, place: Place) -> range:
        """Which of the request's blocks the consumer wants."""
        return range(
            place.first_token // self._block_size, -(-place.num_tokens // self._block_size)
        )

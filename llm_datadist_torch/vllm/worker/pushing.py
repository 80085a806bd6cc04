# SPDX-License-Identifier: Apache-2.0
"""The producer's side in a worker with "push": layers go out while the next ones are computed."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.vllm import mapping
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.params import BlockIds, Peer
from llm_datadist_torch.vllm.protocol import (
    NUMBERS_PER_MESSAGE,
    Place,
    Pushed,
    PushedSums,
    Verdict,
    Where,
    packed,
    unpacked,
)
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Push, PushEnd
from llm_datadist_torch.vllm.worker.processes import this_process
from llm_datadist_torch.vllm.worker.service import TimeLimit, WorkerService, over_layers

logger = logging.getLogger("llm_datadist_torch")

_FIRST_RETRY_S, _LAST_RETRY_S = 0.005, 0.5

Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By part: rows of ours, and rows of the consumer's."""


@dataclass(frozen=True)
class _Layer:
    """One layer of one step's blocks.

    Attributes:
        push: The step's.
        name: The layer's.
        ready: Its event; None where compute is synchronous.
        computation: Which computation of the prompt it is of; see :attr:`_Sending.computation`.
    """

    push: Push
    name: str
    ready: torch.Event | None
    computation: int


@dataclass(frozen=True)
class _Target:
    """Where a transfer is written to."""

    place: Place
    blocks: BlockIds


@dataclass(eq=False)
class _Sending:
    """One transfer, from its first step until its consumer has heard of its end.

    Attributes:
        push: Its first step.
        limit: How long its consumer may take to want it.
        layers: Layers that are there and have not been sent.
        left: Layers that are to be sent with all of the prompt in them.
        launched: Those of them that the engine has computed, or launched.
        computation: Counts how often the prompt has been computed: after a preemption the blocks
            are of other requests, and what was read of them since is sent again.
        target: Where to; None until the consumer has said so.
        sums: Checksums of what was sent, by cache, row of the consumer's, and layer.
        running: Whether a job of it is queued or runs.
        stopped: Nothing more is to be sent.
        ended: The engine has said that its request has ended.
        done: Nothing of the engine's memory is read any more.
    """

    push: Push
    limit: TimeLimit
    left: set[str]
    launched: set[str] = field(default_factory=set)
    computation: int = 0
    retry_s: float = _FIRST_RETRY_S
    layers: deque[_Layer] = field(default_factory=deque)
    target: _Target | None = None
    rows: tuple[Push, Rows] | None = None
    sums: dict[int, dict[int, dict[int, int]]] = field(default_factory=dict)
    running: bool = False
    stopped: bool = False
    ended: bool = False
    done: bool = False


class Sender:
    """Sends blocks layer by layer.

    A transfer is a series of short jobs in its consumer's lane: link, ask where to write until the
    consumer knows, write the layers that are there, say that it is complete. Between them nobody
    waits: a job comes back by itself, or with the next layer. A request that is preempted loses its
    blocks, so what was not sent before is not sent, what was being sent does not count, and all of
    it is sent again when it is computed again.

    Layers are sent by ``push_blocks`` with a layer range. ``transfer_cache_async`` would take two
    tensors for a layer, and here each layer is one tensor of each cache. ``Peer.push_layers`` is
    about one computation of one cache, with a background task per layer; here the rows change with
    each step, a layer may be sent again, and a job already has a thread of its own.

    Thread safety: ``preempted``, ``step``, ``layer_done``, ``step_done`` and ``take_done`` are
    called by the engine's loop, and don't block; ``has_stopped`` by the thread that serves peers.

    Args:
        service: This worker's instance.
        settings: The connector's settings.
        rank: Of this worker: it sends to the consumer's worker of the same rank.
        layout: Its KV.
        device: Where its KV is.
        digest: What the consumer must have, too.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        rank: int,
        layout: KVLayout,
        device: torch.device,
        digest: str,
    ) -> None:
        self._service = service
        self._settings = settings
        self._rank = rank
        self._layout = layout
        self._device = device
        self._digest = digest
        self._process = this_process()
        self._names = tuple(
            dict.fromkeys(itertools.chain.from_iterable(part.layers for part in layout.parts))
        )
        self._pushes: list[Push] = []
        self._unsent: dict[str, None] = {}
        self._lock = threading.Lock()
        self._sendings: dict[str, _Sending] = {}
        self._by_transfer: dict[str, _Sending] = {}
        self._num_sent = 0

    # -- for the engine ---------------------------------------------------------------------------

    def step(self, pushes: Sequence[Push], ends: Sequence[PushEnd]) -> None:
        """What the step computes, before it does; and requests that have ended."""
        self._pushes = list(pushes)
        self._unsent = dict.fromkeys(self._names) if pushes else {}
        for push in pushes:
            if push.request_id not in self._sendings:
                limit = TimeLimit(self._settings.lease_s)
                sending = _Sending(push, limit, set(self._names))
                with self._lock:
                    self._sendings[push.request_id] = sending
                    self._by_transfer[push.transfer_id] = sending
                self._wake(sending)
        for end in ends:
            known = self._sendings.get(end.request_id)
            if known is None:
                self._give_up(end)
                if not end.kept:
                    continue
                push = Push(end.request_id, end.transfer_id, end.peers, (), 0, 0, "", last=True)
                known = _Sending(push, TimeLimit(0), set(), done=True)
                self._sendings[end.request_id] = known
            known.ended = True
            # What is still to come of a request that ended early will not.
            if len(known.launched) < len(self._names):
                known.stopped = True
            self._wake(known)

    def preempted(self, request_ids: Iterable[str]) -> None:
        """The next step writes other requests' tokens to the blocks of these."""
        with self._lock:
            for request_id in request_ids:
                sending = self._sendings.get(request_id)
                if sending is not None and not sending.done:
                    sending.computation += 1
                    sending.layers.clear()
                    sending.launched.clear()
                    sending.left = set(self._names)

    def layer_done(self, name: str) -> None:
        """A layer of this step has been launched (on a device), or is there."""
        if name not in self._unsent:
            # It writes nothing of its own, or there is nothing to send.
            return
        del self._unsent[name]
        ready = None
        if self._device.type != "cpu":
            # Not torch.Event: some platforms put their own class there.
            ready = torch.get_device_module(self._device).Event()
            ready.record()
        for push in self._pushes:
            sending = self._sendings[push.request_id]
            sending.layers.append(_Layer(push, name, ready, sending.computation))
            if push.last:
                sending.launched.add(name)
            self._wake(sending)

    def step_done(self) -> None:
        """All of the step has been launched: layers that nobody has told of, too."""
        for name in list(self._unsent):
            self.layer_done(name)
        self._pushes = []

    def take_done(self) -> set[str]:
        """Ended requests whose blocks need not be kept any more."""
        done = {name for name, each in self._sendings.items() if each.ended and each.done}
        for name in done:
            del self._sendings[name]
        return done

    def take_num_sent(self) -> int:
        """Transfers that were completed since the last call."""
        with self._lock:
            count, self._num_sent = self._num_sent, 0
        return count

    def end_all(self) -> None:
        """The instance has ended: nothing is sent any more."""
        for sending in self._sendings.values():
            sending.done = sending.ended = True

    # -- for peers --------------------------------------------------------------------------------

    def has_stopped(self, transfer_id: str) -> bool | None:
        """A consumer wants no more; True once nothing of a transfer is written any more."""
        with self._lock:
            sending = self._by_transfer.get(transfer_id)
        if sending is None or sending.done:
            return True
        sending.stopped = True
        self._wake(sending)
        return None

    def peer_gone(self, peer: int) -> None:
        """The link to a consumer is lost."""
        with self._lock:
            sendings = list(self._by_transfer.values())
        for sending in sendings:
            target = self._peer(sending.push.peers)
            if sending.target is not None and target is not None and target.cluster_id == peer:
                sending.stopped = True
                self._wake(sending)

    # -- the jobs ---------------------------------------------------------------------------------

    def _peer(self, peers: Sequence[Peer]) -> Peer | None:
        return peers[self._rank] if self._rank < len(peers) else None

    def _wake(self, sending: _Sending) -> None:
        """Have a job of a transfer run, unless one will anyway."""
        with self._lock:
            if sending.running or sending.done:
                return
            sending.running = True
        peer = self._peer(sending.push.peers)
        lane = "push", peer.cluster_id if peer else -1
        self._service.lanes.submit(lane, partial(self._run, sending))

    def _run(self, sending: _Sending) -> None:
        again_s: float | None = None
        try:
            again_s = self._advance(sending)
        except Exception as error:
            logger.warning(
                "the KV of request %s was not pushed: %s",
                sending.push.request_id,
                error,
                exc_info=None if isinstance(error, LLMException) else error,
            )
            self._finish(sending, complete=False)
        if again_s is not None:
            lane = "push", sending.push.peers[self._rank].cluster_id
            # It stays marked as running: the next layer need not wake it.
            self._service.lanes.later(again_s, lane, partial(self._run, sending))
            return
        with self._lock:
            sending.running = False
        if not sending.done and (sending.layers or sending.stopped):
            # Something came after the job had looked.
            self._wake(sending)

    def _advance(self, sending: _Sending) -> float | None:
        """Do what can be done now; seconds after which to come again, None for the next layer."""
        peer = self._peer(sending.push.peers)
        if peer is None:
            raise param_error(
                f"the consumer has {len(sending.push.peers)} worker(s), none of rank {self._rank}"
            )
        if sending.stopped:
            self._finish(sending, complete=False)
            return None
        if sending.target is None and not self._find_target(sending, peer):
            sending.retry_s = min(2 * sending.retry_s, _LAST_RETRY_S)
            return None if sending.done else sending.retry_s
        while not sending.stopped and (layer := self._next_layer(sending)) is not None:
            self._send_layer(sending, peer, layer)
            with self._lock:
                # What was preempted meanwhile may have been overwritten while it was read.
                if layer.push.last and layer.computation == sending.computation:
                    sending.left.discard(layer.name)
        if not sending.left:
            self._finish(sending, complete=True)
        return None

    def _next_layer(self, sending: _Sending) -> _Layer | None:
        with self._lock:
            return sending.layers.popleft() if sending.layers else None

    def _find_target(self, sending: _Sending, peer: Peer) -> bool:
        """Ask the consumer where to write; False if it does not know yet, or wants nothing."""
        limit = TimeLimit(self._settings.timeout_s)
        try:
            self._service.meet(peer, limit)
            place, numbers = self._where(sending, peer, limit)
        except LLMException:
            # It may be starting.
            if sending.limit.expired:
                raise
            return False
        if not place.known:
            if sending.limit.expired:
                raise error_for(
                    LLMStatusCode.LLM_TIMEOUT,
                    f"nobody asked for transfer {sending.push.transfer_id}",
                )
            return False
        if not place.wanted:
            sending.done = True
            self._forget(sending)
            return False
        sending.target = _Target(place, _by_group(numbers, place.counts))
        push = sending.push
        if (place.prompt, place.digest) != (push.prompt, self._digest):
            what = "prompt" if place.prompt != push.prompt else "KV"
            raise param_error(f"the consumer of transfer {push.transfer_id} has another {what}")
        return True

    def _where(self, sending: _Sending, peer: Peer, limit: TimeLimit) -> tuple[Place, list[int]]:
        numbers: list[int] = []
        while True:
            question = Where(
                sending.push.transfer_id, self._service.address, self._process, len(numbers)
            )
            answer = self._service.request(peer.cluster_id, question, limit)
            place = msgspec.msgpack.decode(answer, type=Place)
            more = unpacked(place.blocks)
            numbers += more
            if not more or len(numbers) >= sum(place.counts):
                return place, numbers

    def _send_layer(self, sending: _Sending, peer: Peer, layer: _Layer) -> None:
        if sending.target is None:
            return
        if sending.rows is None or sending.rows[0] is not layer.push:
            sending.rows = layer.push, self._rows(sending.target, layer.push)
        if layer.ready is not None:
            layer.ready.synchronize()
        place = sending.target.place
        for part, (src_rows, dst_rows) in sending.rows[1].items():
            names = self._layout.parts[part].layers
            if layer.name not in names:
                continue
            at = names.index(layer.name)
            layers = range(at, at + 1)
            self._service.datadist.cache_manager.push_blocks(
                BlocksCacheKey(peer.cluster_id, place.model_ids[part]),
                self._service.caches[part],
                src_rows,
                dst_rows,
                layers,
                layers,
                1,
                wait_stream=torch.cpu.current_stream(),
            )
            if place.verify:
                sums = sending.sums.setdefault(part, {})
                for src, dst in zip(src_rows.tolist(), dst_rows.tolist(), strict=True):
                    sums.setdefault(dst, {})[at] = self._service.checksum(part, at, src)

    def _rows(self, target: _Target, push: Push) -> Rows:
        """What a step's blocks are, by part."""
        place = target.place
        tokens = mapping.Tokens(
            max(push.first_token, place.first_token),
            min(push.num_tokens, place.num_tokens),
            partial=push.last,
            rounded=True,
        )
        # Whole pages: both ends have the same layout, and a part's index is its cache's.
        found = mapping.moves(self._layout, self._layout, target.blocks, push.blocks, tokens)
        return {move.dst_cache: (move.src_rows, move.dst_rows) for move in found}

    # -- the end ----------------------------------------------------------------------------------

    def _finish(self, sending: _Sending, *, complete: bool) -> None:
        """Nothing of it is written any more; its consumer is told, however long that takes."""
        if sending.done:
            return
        sending.done = True
        if complete:
            with self._lock:
                self._num_sent += 1
        self._forget(sending)
        self._notify(sending, complete, _FIRST_RETRY_S)

    def _forget(self, sending: _Sending) -> None:
        with self._lock:
            if self._by_transfer.get(sending.push.transfer_id) is sending:
                del self._by_transfer[sending.push.transfer_id]

    def _give_up(self, end: PushEnd) -> None:
        """A request ended before its first layer: its consumer waits for nothing."""
        push = Push(end.request_id, end.transfer_id, end.peers, (), 0, 0, "", last=True)
        sending = _Sending(push, TimeLimit(self._settings.lease_s), set(), done=True)
        peer = self._peer(end.peers)
        if peer is not None:
            job = partial(self._notify, sending, False, _FIRST_RETRY_S)
            self._service.lanes.submit(("push", peer.cluster_id), job)

    def _notify(self, sending: _Sending, complete: bool, retry_s: float) -> None:
        peer = self._peer(sending.push.peers)
        if peer is None:
            return
        transfer_id = sending.push.transfer_id
        limit = TimeLimit(self._settings.timeout_s)
        place = sending.target.place if sending.target else None
        life = place.life if place else ""
        pushed = Pushed(life, transfer_id, self._service.life, complete)
        try:
            self._service.meet(peer, limit)
            if complete and place is not None and place.verify:
                self._tell_sums(sending, peer, life, limit)
            answer = self._service.request(peer.cluster_id, pushed, limit)
        except LLMException as error:
            if sending.limit.expired:
                logger.warning(
                    "the consumer waits in vain for the KV of request %s: %s",
                    sending.push.request_id,
                    error,
                )
                return
            again = partial(self._notify, sending, complete, min(2 * retry_s, _LAST_RETRY_S))
            self._service.lanes.later(retry_s, ("push", peer.cluster_id), again)
            return
        if complete and not msgspec.msgpack.decode(answer, type=Verdict).held:
            logger.warning("the consumer did not wait for transfer %s", transfer_id)

    def _tell_sums(self, sending: _Sending, peer: Peer, life: str, limit: TimeLimit) -> None:
        for cache, of_rows in sending.sums.items():
            rows = list(of_rows)
            for start in range(0, len(rows), NUMBERS_PER_MESSAGE):
                some = rows[start : start + NUMBERS_PER_MESSAGE]
                sums = [
                    over_layers([of_rows[row][at] for at in sorted(of_rows[row])]) for row in some
                ]
                question = PushedSums(
                    life, sending.push.transfer_id, cache, packed(some), packed(sums, "I")
                )
                self._service.request(peer.cluster_id, question, limit)


def _by_group(numbers: Sequence[int], counts: Sequence[int]) -> BlockIds:
    rest = iter(numbers)
    return tuple(tuple(itertools.islice(rest, count)) for count in counts)

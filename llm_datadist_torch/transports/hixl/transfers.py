# SPDX-License-Identifier: Apache-2.0
"""The transfers of one movement: descriptors, requests, and waiting for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from llm_datadist_torch.transports.base import Movement, timed_out
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.ports import COMPLETED, WAITING
from llm_datadist_torch.transports.hixl.statuses import (
    RESOURCE_EXHAUSTED,
    SUCCESS,
    hixl_error,
)
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

MAX_REQUESTS = 8
"""Requests under way at a time: each holds resources of the engine."""

_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 1e-3


class Requests:
    """The requests of one movement, from one thread that has the engine's device set.

    Args:
        engine: Ours.
        remote: The peer's engine.
        deadline: When all must be done.
        check_open: Raises when the link has ended.
    """

    def __init__(
        self, engine: HixlEngine, remote: str, deadline: Deadline, check_open: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._remote = remote
        self._deadline = deadline
        self._check_open = check_open
        self._pending: deque[object] = deque()
        self._nap_s = _SHORTEST_NAP_S

    def run(self, movement: Movement) -> None:
        """Move everything.

        Raises:
            LLMTimeoutError: The deadline passed; requests may be under way.
            LLMException: A request failed; others may be under way.
        """
        total = len(movement.local_addrs) * len(movement.runs)
        chunk = self._engine.port.chunk
        for first in range(0, total, chunk):
            while len(self._pending) >= MAX_REQUESTS:
                self._wait_a_little()
            self._submit(movement, first, min(chunk, total - first))
        while self._pending:
            self._wait_a_little()

    def _submit(self, movement: Movement, first: int, count: int) -> None:
        while True:
            status, request = self._engine.port.transfer(self._remote, movement, first, count)
            if status == SUCCESS:
                self._pending.append(request)
                return
            if status != RESOURCE_EXHAUSTED:
                raise hixl_error(status, f"start a transfer with {self._remote}")
            # It has no stream left until other transfers have finished.
            self._wait_a_little()

    def _wait_a_little(self) -> None:
        """Take the requests off the list that are done; sleep if none is.

        Raises:
            LLMTimeoutError: The deadline has passed.
            LLMException: A request has failed.
        """
        if self._take_done():
            self._nap_s = _SHORTEST_NAP_S
            return
        self._check_open()
        remaining_s = self._deadline.remaining_s()
        if remaining_s <= 0:
            raise timed_out(self._deadline)
        time.sleep(min(self._nap_s, remaining_s))
        self._nap_s = min(self._nap_s * 2, _LONGEST_NAP_S)

    def _take_done(self) -> bool:
        done = False
        while self._pending:
            status, state = self._engine.port.transfer_state(self._pending[0])
            if status != SUCCESS:
                raise hixl_error(status, f"follow a transfer with {self._remote}")
            if state == WAITING:
                break
            # HIXL has forgotten the request, which must not be asked for again.
            self._pending.popleft()
            if state != COMPLETED:
                raise error_for(
                    LLMStatusCode.LLM_FAILED,
                    f"a transfer with {self._remote} failed; the destination may be partly written",
                    remedy="see whether the peer still runs; CANN's log has the cause. The link"
                    " stays usable.",
                )
            done = True
        return done

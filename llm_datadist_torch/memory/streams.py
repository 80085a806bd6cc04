# SPDX-License-Identifier: Apache-2.0
"""Streams of whatever device: what bytes must wait for, and what must wait for bytes.

Host memory has no stream of its own, but copies from a device may be on their way into it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TypeAlias

import torch

from llm_datadist_torch.memory.device_copies import callers_device, current_device
from llm_datadist_torch.memory.in_flight import InFlight
from llm_datadist_torch.values.checks import check_isinstance
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMDeviceError, LLMStatusCode, error_for

Stream: TypeAlias = "torch.Stream | torch.cpu.Stream"

HOST = torch.device("cpu").type
_SHORTEST_PAUSE_S = 0.00002
_LONGEST_PAUSE_S = 0.001

in_flight = InFlight()
"""The copies of this process that were left on streams."""


class StreamPoint:
    """All that had been launched on a stream when this was made. Waited for at most once.

    Args:
        stream: The stream; None for nothing to wait for.
    """

    def __init__(self, stream: torch.Stream | None) -> None:
        self._event = None if stream is None else stream.record_event()

    def wait(self, deadline: Deadline) -> None:
        """Block until it is done, from whatever thread.

        Raises:
            LLMTimeoutError: The deadline passed before.
            LLMDeviceError: The device failed.
        """
        pause = _SHORTEST_PAUSE_S
        try:
            while self._event is not None and not self._event.query():
                if deadline.expired:
                    raise error_for(
                        LLMStatusCode.LLM_TIMEOUT,
                        f"the stream did not get done in {deadline.budget_ms} ms with what must"
                        " come before the transfer; no byte has moved",
                        remedy="synchronise before the call, raise sync_kv_timeout, or give another"
                        " wait_stream.",
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        except RuntimeError as error:
            if isinstance(error, TimeoutError):
                raise
            raise LLMDeviceError(f"the device failed before the transfer: {error}") from error


def point(wait_stream: Stream | None, device: torch.device) -> StreamPoint:
    """What a transfer of memory on ``device`` has to wait for.

    Args:
        wait_stream: What the caller said. None: the calling thread's current stream of ``device``
            or, for host memory, of the accelerator that is in use.
        device: Where the local memory is.

    Raises:
        TypeError: ``wait_stream`` is not a stream.
    """
    check_isinstance("wait_stream", wait_stream, (torch.Stream, torch.cpu.Stream))
    if wait_stream is None:
        wait_stream = _current_stream(device)
    # A CPU stream is always done.
    return StreamPoint(wait_stream if isinstance(wait_stream, torch.Stream) else None)


def keep_until_done(device: torch.device, release: Callable[[], None]) -> None:
    """Call ``release`` once all that is on the current stream of ``device`` now is done.

    Host memory: at once. ``release`` must not raise; another thread may call it.
    """
    if device.type == HOST:
        release()
    else:
        in_flight.add(_module(device).current_stream(device).record_event(), release)


def wait_until_done(device: torch.device) -> None:
    """Block until all that is on the current stream of ``device`` now is done."""
    if device.type != HOST:
        _module(device).current_stream(device).synchronize()


def keep_host_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Keep those in host memory until the device that the others are on is done with them.

    What is in device memory its allocator keeps.
    """
    held = [tensor for tensor in tensors if tensor.device.type == HOST]
    keep_until_done(device_of(tensor.device for tensor in tensors), held.clear)


def device_of(devices: Iterable[torch.device]) -> torch.device:
    """The one that isn't the CPU, if there is one."""
    return next((device for device in devices if device.type != HOST), torch.device(HOST))


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Have a stream of this library's, of ``device``, as the current one.

    What is launched there does not wait for anybody's kernels, and nobody's kernels wait for it.
    """
    with current_device(device), _module(device).stream(_stream_of_ours(device)):
        yield


@cache
def _stream_of_ours(device: torch.device) -> torch.Stream:
    return _module(device).Stream(device)  # type: ignore[no-any-return]


def _current_stream(device: torch.device) -> torch.Stream | None:
    if device.type != HOST:
        return _module(device).current_stream(device)  # type: ignore[no-any-return]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not _module(accelerator).is_initialized():
        return None
    return _module(accelerator).current_stream(callers_device())  # type: ignore[no-any-return]


def _module(device: torch.device) -> ModuleType:
    return torch.get_device_module(device)  # type: ignore[no-any-return]

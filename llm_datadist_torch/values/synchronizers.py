# SPDX-License-Identifier: Apache-2.0
"""``EventSynchronizer``: a layer is ready when its event is."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from llm_datadist_torch.values.transfer import LayerSynchronizer

_SLICE_S = 0.02
_POLL_S = 0.0002


@runtime_checkable
class DeviceEvent(Protocol):
    """A torch event of any device: ``torch.Event``, ``torch.npu.Event``, ``torch.cpu.Event``."""

    def query(self) -> bool:
        """Whether everything recorded has been done."""

    def synchronize(self) -> None:
        """Block until it has."""

    def record(self, *args: object) -> object:
        """Record what has been launched on a stream."""


@runtime_checkable
class FlagEvent(Protocol):
    """A flag that somebody sets: ``threading.Event``, ``multiprocessing.Event``."""

    def is_set(self) -> bool:
        """Whether it has been set."""

    def set(self) -> None:
        """Set it."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is set, or the time has passed; whether it is set."""


class EventSynchronizer(LayerSynchronizer):
    """A synchronizer for ``transfer_cache_async`` made of events, one per layer of the source.

    With torch events, call :meth:`record` after the kernels of a layer have been launched. An event
    that was not recorded here is never taken for complete, though a fresh torch event says it is::

        ready = EventSynchronizer([torch.npu.Event() for _ in range(num_layers)])
        task = manager.transfer_cache_async(cache, ready, configs)
        for layer in range(num_layers):
            run_layer(layer)
            ready.record(layer)

    With flags (``threading.Event``), for compute on the CPU, set the flag or call :meth:`record`.
    Both kinds may be mixed. One object serves one pass through the layers.

    Thread safety: all methods may be called from any thread; several tasks may share one.

    Args:
        events: One per layer. Kept; only used as described.

    Raises:
        TypeError: An element is neither kind of event.
    """

    def __init__(self, events: Sequence[DeviceEvent | FlagEvent]) -> None:
        for index, event in enumerate(events):
            if not isinstance(event, (DeviceEvent, FlagEvent)):
                raise TypeError(
                    f"events[{index}] is a {type(event).__name__}; it needs query(), record()"
                    " and synchronize(), or is_set(), set() and wait()"
                )
        self._events = tuple(events)
        self._recorded = tuple(threading.Event() for _ in events)
        self._aborted = threading.Event()

    def record(self, layer_index: int, *args: object) -> None:
        """Say that the layer's work has been launched (a flag: has been done). Does not block.

        Args:
            layer_index: Layer of the source, from 0.
            args: Passed to ``event.record()``: a stream, where it isn't the current one.

        Raises:
            IndexError: There is no such layer.
        """
        event = self._events[self._checked(layer_index)]
        if isinstance(event, DeviceEvent):
            event.record(*args)
        else:
            event.set()
        self._recorded[layer_index].set()

    def abort(self) -> None:
        """End all waits, now and later, with False: the layers that are missing will not come."""
        self._aborted.set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Blocks until the layer's event has been recorded and is complete, or its flag is set.

        Args:
            layer_index: Layer of the source, from 0.
            timeout_in_millis: How long to wait at most, None for as long as it takes.

        Returns:
            False if the time has passed, or :meth:`abort` was called.

        Raises:
            IndexError: There is no such layer.
        """
        event = self._events[self._checked(layer_index)]
        end = None if timeout_in_millis is None else time.monotonic() + timeout_in_millis / 1000
        if not isinstance(event, DeviceEvent):
            return self._wait(event, end)
        if not self._wait(self._recorded[layer_index], end):
            return False
        if end is None:
            event.synchronize()
            return True
        while not event.query():
            if time.monotonic() >= end or self._aborted.is_set():
                return False
            time.sleep(_POLL_S)
        return True

    def _wait(self, flag: FlagEvent, end: float | None) -> bool:
        """Wait in slices, since only one of two events can be waited for."""
        while not self._aborted.is_set():
            left = _SLICE_S if end is None else min(_SLICE_S, end - time.monotonic())
            if flag.wait(max(0.0, left)):
                return True
            if end is not None and time.monotonic() >= end:
                return False
        return False

    def _checked(self, layer_index: int) -> int:
        if not 0 <= layer_index < len(self._events):
            raise IndexError(f"layer {layer_index} is out of range [0, {len(self._events)})")
        return layer_index

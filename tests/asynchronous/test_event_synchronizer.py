# SPDX-License-Identifier: Apache-2.0
"""``EventSynchronizer``: torch events and flags."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from llm_datadist_torch import EventSynchronizer, LayerSynchronizer


class DeviceEvent:
    """A device event whose work takes until ``finish``; fresh ones are complete, as torch's are."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.finished.set()
        self.streams: list[Any] = []

    def record(self, stream: Any = None) -> None:
        self.streams.append(stream)
        self.finished.clear()

    def finish(self) -> None:
        self.finished.set()

    def query(self) -> bool:
        return self.finished.is_set()

    def synchronize(self) -> None:
        assert self.finished.wait(60)


def asked(synchronizer: EventSynchronizer, layer: int) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(
        target=lambda: answers.append(synchronizer.synchronize_layer(layer, None))
    )
    thread.start()
    return thread, answers


def test_it_is_a_synchronizer() -> None:
    assert isinstance(EventSynchronizer([]), LayerSynchronizer)


def test_torch_events() -> None:
    ready = EventSynchronizer([torch.cpu.Event(), torch.cpu.Event()])
    ready.record(1)
    assert ready.synchronize_layer(1, None) is True
    assert ready.synchronize_layer(1, 0) is True
    assert ready.synchronize_layer(0, 1) is False


@pytest.mark.parametrize("timeout", [None, 60_000])
def test_a_layer_is_ready_when_recorded_and_complete(timeout: int | None) -> None:
    event = DeviceEvent()
    ready = EventSynchronizer([event])
    # A fresh event says that it is complete; that means nothing.
    assert event.query()
    assert ready.synchronize_layer(0, 1) is False
    ready.record(0, "stream 3")
    assert event.streams == ["stream 3"]
    assert ready.synchronize_layer(0, 1) is False
    event.finish()
    assert ready.synchronize_layer(0, timeout) is True


def test_flags() -> None:
    flags = [threading.Event(), threading.Event()]
    ready = EventSynchronizer(flags)
    assert ready.synchronize_layer(0, 1) is False
    flags[0].set()
    assert ready.synchronize_layer(0, None) is True
    ready.record(1)
    assert flags[1].is_set()
    assert ready.synchronize_layer(1, 0) is True


@pytest.mark.parametrize("make", [DeviceEvent, threading.Event])
def test_waiting_ends_with_the_event(make: Any) -> None:
    event = make()
    ready = EventSynchronizer([event])
    thread, answers = asked(ready, 0)
    thread.join(0.05)
    assert thread.is_alive()
    ready.record(0)
    if isinstance(event, DeviceEvent):
        thread.join(0.05)
        assert thread.is_alive()
        event.finish()
    thread.join(60)
    assert answers == [True]


@pytest.mark.parametrize("make", [DeviceEvent, threading.Event])
def test_abort(make: Any) -> None:
    ready = EventSynchronizer([make()])
    thread, answers = asked(ready, 0)
    ready.abort()
    thread.join(60)
    assert answers == [False]
    assert ready.synchronize_layer(0, None) is False


def test_abort_while_the_device_works() -> None:
    ready = EventSynchronizer([DeviceEvent()])
    ready.record(0)
    ready.abort()
    assert ready.synchronize_layer(0, 60_000) is False


@pytest.mark.parametrize(
    "event", [None, 1, object(), torch.zeros(1)], ids=["None", "int", "object", "tensor"]
)
def test_what_is_no_event(event: Any) -> None:
    with pytest.raises(TypeError, match=r"events\[1\]"):
        EventSynchronizer([threading.Event(), event])


@pytest.mark.parametrize("layer", [-1, 1])
def test_layers_out_of_range(layer: int) -> None:
    ready = EventSynchronizer([threading.Event()])
    with pytest.raises(IndexError):
        ready.synchronize_layer(layer, None)
    with pytest.raises(IndexError):
        ready.record(layer)

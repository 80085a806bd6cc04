# SPDX-License-Identifier: Apache-2.0
"""Transfers layer by layer: a push that follows the compute, a pull that runs ahead of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from llm_datadist_torch.api.transfer import PreparedTransfer, wait
from llm_datadist_torch.links.work import CacheTask
from llm_datadist_torch.memory.streams import Stream
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for

if TYPE_CHECKING:
    from typing_extensions import Self

PrepareLayer = Callable[[int], PreparedTransfer]


class _LayerTransfer:
    """Background transfers of single layers, which end together.

    As a context manager it waits for all of them on exit; if the block raised, it cancels what has
    not begun, and waits for the rest. Then nothing reads or writes the local cache any more.
    """

    def __init__(self, layers: range, prepare: PrepareLayer, timeout_s: float | None) -> None:
        self._layers = layers
        self._prepare = prepare
        self._timeout_s = timeout_s
        self._tasks: dict[int, CacheTask] = {}

    @property
    def layers(self) -> range:
        """The local layers that it is about."""
        return self._layers

    def _start(self, layer: int, stream: Stream | None) -> None:
        transfer = self._prepare(layer)
        self._tasks[layer] = transfer.start(wait_stream=stream, timeout_s=self._timeout_s)

    def wait(self, layer: int | None = None, timeout_s: float | None = None) -> None:
        """Block until a layer, or all that were started, have been moved.

        Args:
            layer: Local layer. None: all that were started.
            timeout_s: Seconds to wait for each of them at most. None: for as long as it takes,
                which the transfer's own limit bounds.

        Raises:
            LLMParamError: The layer was not started.
            LLMTimeoutError: It is not there yet; it goes on.
            LLMException: Why the transfer failed.
        """
        if layer is None:
            for task in self._tasks.values():
                wait(task, timeout_s)
            return
        task_of_layer = self._tasks.get(operator.index(layer))
        if task_of_layer is None:
            raise param_error(f"layer {layer} was not started, of {self._layers}")
        wait(task_of_layer, timeout_s)

    def cancel(self) -> None:
        """Start nothing more, and wait until what is under way has ended. Raises nothing for it."""
        for task in self._tasks.values():
            task.cancel()
        for task in self._tasks.values():
            task.synchronize()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for all layers, or, after an exception, for the end of what is under way."""
        if kind is not None:
            self.cancel()
            return
        try:
            self.wait()
        except BaseException:
            self.cancel()
            raise
        self._check_complete()

    def _check_complete(self) -> None:
        """Whether the block did its part; nothing to check for a pull."""


class LayerPush(_LayerTransfer):
    """Sends each layer as soon as the caller says that it is computed: ``Peer.push_layers``.

    Thread safety: :meth:`ready` belongs to one thread.
    """

    def ready(self, layer: int | None = None, *, stream: Stream | None = None) -> None:
        """Send a layer, when what is on the stream now has been done. Does not block.

        Args:
            layer: Local layer. None: the next one in order.
            stream: The stream that computes it. None: the calling thread's current stream.

        Raises:
            LLMParamError: No such layer, or one that was sent before.
        """
        if layer is None:
            layer = next((each for each in self._layers if each not in self._tasks), None)
            if layer is None:
                raise param_error(f"all of {self._layers} have been sent")
        layer = operator.index(layer)
        if layer not in self._layers:
            raise param_error(f"layer {layer} is not in {self._layers}")
        if layer in self._tasks:
            raise param_error(f"layer {layer} has been sent before")
        self._start(layer, stream)

    def _check_complete(self) -> None:
        missing = [layer for layer in self._layers if layer not in self._tasks]
        if missing:
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"{len(missing)} of {len(self._layers)} layers were never sent, {missing[0]} first",
                remedy="call ready() for each layer inside the with block.",
            )


class LayerPull(_LayerTransfer):
    """Fetches all layers in the background: ``Peer.pull_layers``.

    Iterating over it yields each layer's number, in order, once the layer has arrived.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(
        self,
        layers: range,
        prepare: PrepareLayer,
        timeout_s: float | None,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(layers, prepare, timeout_s)
        try:
            for layer in layers:
                self._start(layer, stream)
        except BaseException:
            self.cancel()
            raise

    def __iter__(self) -> Iterator[int]:
        """The layers in order, each once it has arrived.

        Raises:
            LLMException: Why a layer could not be fetched.
        """
        for layer in self._layers:
            self.wait(layer)
            yield layer

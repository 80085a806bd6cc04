# SPDX-License-Identifier: Apache-2.0
"""What copies on an NPU need of torch_npu: the thread's device, and its stream as an integer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.device_errors import missing_runtime
from llm_datadist_torch.values.status import LLMDeviceError

logger = logging.getLogger("llm_datadist_torch")

_thread = threading.local()

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # aclrtMemcpyKind


def npu_of(to: torch.device, at: torch.device) -> torch.device:
    """The NPU that does a copy between memory of two devices.

    Raises:
        ValueError: Both are host memory, or they are two NPUs.
    """
    if to.type == at.type == "cpu":
        raise ValueError("neither side is in device memory")
    if to != at and "cpu" not in (to.type, at.type):
        raise ValueError(f"dst is on {to}, but src on {at}: one call works on one device")
    return at if to.type == "cpu" else to


def callers_device() -> int | None:
    """The device that this thread had before it came into ``current_device``.

    None outside, and for a thread that had set none.
    """
    return getattr(_thread, "callers", None)


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Have ``device`` as the thread's current one, for torch_npu and for the runtime.

    Afterwards the thread has the device that it had before; one that had set none has torch_npu's
    default again, unless that can't be used.

    Raises:
        LLMFeatureNotEnabledError: There is no Ascend runtime in this process.
        LLMDeviceError: The device can't be used.
    """
    scope = _module_of(device).device(device)
    try:
        scope.__enter__()
    except RuntimeError as error:
        raise LLMDeviceError(f"{device} can't be used in this thread: {error}") from error
    is_outermost = callers_device() is None
    if is_outermost and scope.prev_idx >= 0:
        _thread.callers = scope.prev_idx
    try:
        _C.use_device(device.index)
        yield
    finally:
        if is_outermost:
            _thread.callers = None
        try:
            scope.__exit__(None, None, None)
        except RuntimeError as error:
            # What the call came to is the news, and not that another device is gone.
            logger.debug("this thread keeps %s: %s", device, error)


def stream_of(device: torch.device) -> int:
    """The calling thread's current stream of ``device``, as the runtime knows it.

    torch_npu launches its kernels from a queue of its own; when this returns, what this thread gave
    it before is on the stream, so that calls of the runtime come after that. Waits for the queue
    with the GIL released.
    """
    return int(_module_of(device).current_stream(device.index).npu_stream)


def copy_runs(
    dst_bases: torch.Tensor,
    src_bases: torch.Tensor,
    runs: torch.Tensor,
    dst_device: torch.device,
    src_device: torch.device,
    deadline_ns: int = 0,
) -> int:
    """Copy runs between addresses, of which one at least is on an NPU, on its current stream.

    Addresses are trusted. Blocks until the bytes are there, with the GIL released.

    Args:
        dst_bases: Addresses written, int64 [T].
        src_bases: As many addresses read.
        runs: int64 [R, 3]: offset in dst, offset in src, bytes; applied to every pair of bases.
        dst_device: Where the memory written is.
        src_device: Where the memory read is; another NPU than the other is reached by peer access.
        deadline_ns: CLOCK_MONOTONIC; 0 for none.

    Returns:
        The bytes copied; fewer than all mean that the deadline has passed.

    Raises:
        ValueError: Neither side is in device memory, or tables that don't fit each other.
        LLMFeatureNotEnabledError: There is no Ascend runtime in this process.
        LLMDeviceError: The device reported an error.
    """
    between_npus = dst_device != src_device and "cpu" not in (dst_device.type, src_device.type)
    device = dst_device if between_npus else npu_of(dst_device, src_device)
    if dst_device.type == "cpu":
        kind = _DEVICE_TO_HOST
    else:
        kind = _HOST_TO_DEVICE if src_device.type == "cpu" else _DEVICE_TO_DEVICE
    with current_device(device):
        if between_npus:
            _C.enable_peer_access(src_device.index)
        stream = stream_of(device)
        return _C.copy_runs_on_stream(dst_bases, src_bases, runs, kind, stream, deadline_ns)


def _module_of(device: torch.device) -> ModuleType:
    try:
        return torch.get_device_module(device)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise missing_runtime("torch_npu is not imported in this process") from error

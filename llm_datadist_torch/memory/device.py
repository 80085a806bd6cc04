# SPDX-License-Identifier: Apache-2.0
"""Which device ``Placement.DEVICE`` means to an instance, and where its caches get memory."""

from __future__ import annotations

import importlib.util
import logging
import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch

from llm_datadist_torch.memory.address import HOST
from llm_datadist_torch.memory.allocate import CacheMemory, HostMemory
from llm_datadist_torch.memory.arena import ArenaMemory, PoolSize
from llm_datadist_torch.memory.device_copies import current_device
from llm_datadist_torch.memory.npu import NpuMemory
from llm_datadist_torch.memory.npu_address import torch_npu
from llm_datadist_torch.memory.pinned import PinnedMemory, allocate_pinned_bytes
from llm_datadist_torch.memory.products import Support, product_of
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

NPU = "npu"
"""What torch_npu calls its devices."""

_USE_CPU = 'or set LLMConfig.device = "cpu".'

_warned_chips: set[str] = set()
_warned_lock = threading.Lock()


class Device(ABC):
    """One device as an instance sees it: memory for its caches, and what its threads must do.

    Attributes:
        device: What ``Placement.DEVICE`` means, on an NPU with its index.
        reason: Why it was chosen.
    """

    def __init__(self, device: torch.device, reason: str) -> None:
        self.device = device
        self.reason = reason

    @abstractmethod
    def memory(self, pool: PoolSize | None) -> CacheMemory:
        """Memory for DEVICE caches: a pool's, or without one whatever can be had.

        Raises:
            LLMOutOfMemoryError: The pool can't be had.
        """

    @abstractmethod
    def host_memory(self, pool: PoolSize | None) -> CacheMemory:
        """Memory for HOST caches, likewise."""

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Have it as the calling thread's current device, which gets back what it had."""

    @abstractmethod
    def enter_thread(self) -> None:
        """To be called first in every thread that this library starts. Never raises."""


class HostDevice(Device):
    """The CPU: DEVICE caches and HOST caches are in the same kind of memory."""

    def __init__(self, reason: str) -> None:
        super().__init__(HOST, reason)

    def memory(self, pool: PoolSize | None) -> CacheMemory:
        """See :meth:`Device.memory`."""
        return HostMemory() if pool is None else ArenaMemory(pool)

    def host_memory(self, pool: PoolSize | None) -> CacheMemory:
        """See :meth:`Device.host_memory`."""
        return self.memory(pool)

    def current(self) -> AbstractContextManager[None]:
        """See :meth:`Device.current`. Nothing to do."""
        return nullcontext()

    def enter_thread(self) -> None:
        """See :meth:`Device.enter_thread`. Nothing to do."""


class NpuDevice(Device):
    """One NPU."""

    def memory(self, pool: PoolSize | None) -> CacheMemory:
        """See :meth:`Device.memory`."""
        memory = NpuMemory(self.device)
        return memory if pool is None else ArenaMemory(pool, memory.reserve, memory.synchronize)

    def host_memory(self, pool: PoolSize | None) -> CacheMemory:
        """See :meth:`Device.host_memory`. Pinned, so that the NPU can copy from and to it."""
        return PinnedMemory() if pool is None else ArenaMemory(pool, allocate_pinned_bytes)

    def current(self) -> AbstractContextManager[None]:
        """See :meth:`Device.current`."""
        return current_device(self.device)

    def enter_thread(self) -> None:
        """See :meth:`Device.enter_thread`.

        The runtime has a current device per thread and refuses calls of threads without one.
        """
        try:
            torch_npu().npu.set_device(self.device)
        except RuntimeError:
            # Calls of this thread that need the device will fail and report it.
            logger.exception("%s can't be used in this thread", self.device)


def choose_device(wanted: str, device_id: int) -> Device:
    """The device for an instance. Imports torch_npu unless the CPU is wanted.

    Args:
        wanted: "npu", "cpu", or "auto": the NPU where there is one that torch_npu can use.
        device_id: Index of the NPU.

    Raises:
        LLMFeatureNotEnabledError: An NPU was asked for and none can be used, or the NPU is of a
            product that is not supported.
        LLMParamError: There is an NPU, but none of this index.
        LLMDeviceError: The NPU doesn't answer.
    """
    if wanted == HOST.type:
        return HostDevice('LLMConfig.device is "cpu"')
    problem, remedy = why_no_npu()
    if problem:
        if wanted == "auto":
            return HostDevice(problem)
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"device={wanted!r} can't be used: {problem}",
            op="init",
            remedy=f"{remedy}, {_USE_CPU}",
        )
    count = torch_npu().npu.device_count()
    if device_id >= count:
        raise param_error(
            f"device_id={device_id} is out of range: torch_npu sees {count} NPU(s)",
            remedy=f"give an index below {count}, look at ASCEND_RT_VISIBLE_DEVICES, {_USE_CPU}",
        )
    device = torch.device(NPU, device_id)
    chip = _chip_of(device)
    _check_product(chip)
    return NpuDevice(device, f"torch_npu has {count} NPU(s), {device} is an {chip}")


def why_no_npu() -> tuple[str, str]:
    """Why torch_npu has no NPU for us, and what to do about it; empty texts if it has."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed", "install torch_npu for this torch"
    try:
        available = torch_npu().npu.is_available()
    except Exception as error:  # noqa: BLE001 (it loads native libraries, and may raise anything)
        cause = f"torch_npu can't be imported: {error}"
        return cause, "install the CANN toolkit and source its set_env.sh"
    if not available:
        return "torch_npu sees no NPU", "look for it with npu-smi info, and check the driver"
    return "", ""


def _chip_of(device: torch.device) -> str:
    try:
        torch_npu().npu.init()  # what refuses forked children of a process that has used an NPU
        return str(torch_npu().npu.get_device_name(device.index))
    except RuntimeError as error:
        raise error_for(
            LLMStatusCode.LLM_DEVICE_MEM_ERROR,
            f"{device} can't be used: {error}",
            op="init",
            remedy=f"look at the device's state (npu-smi info), {_USE_CPU}",
        ) from error


def _check_product(chip: str) -> None:
    product = product_of(chip)
    if product.support is Support.NONE:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"{chip} ({product.name}) is {product.support.value}",
            op="init",
            remedy=f"use an Atlas A5, A3 or A2 inference product, {_USE_CPU}",
        )
    if product.support is Support.WARN:
        with _warned_lock:
            first = chip not in _warned_chips
            _warned_chips.add(chip)
        if first:
            logger.warning("%s (%s) is %s", chip, product.name, product.support.value)

# SPDX-License-Identifier: Apache-2.0
"""What a runtime that fails comes to: a typed error, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    CacheDesc,
    DataType,
    LLMDeviceError,
    LLMOutOfMemoryError,
    LLMParamError,
)
from llm_datadist_torch.memory.address import check_alive, probe
from llm_datadist_torch.memory.device import NpuDevice, choose_device
from llm_datadist_torch.memory.npu import NpuMemory
from llm_datadist_torch.memory.pinned import PinnedMemory, allocate_pinned_bytes
from llm_datadist_torch.values.config import PoolConfig
from tests import simulator_faults as faults

pytestmark = pytest.mark.needs_simulated_npu

LARGE = 48 << 20  # never from memory that the allocator has already
DEVICE_FAULT = 507899


@pytest.fixture(autouse=True)
def no_faults(npu: Any) -> Iterator[None]:
    # What earlier tests have freed would be handed out again, and the runtime not asked.
    gc.collect()
    npu.synchronize()
    npu.empty_cache()
    npu.host_empty_cache()
    yield
    faults.reset()


def test_pinning_fails() -> None:
    faults.fail("aclrtMallocHost", times=0)
    with pytest.raises(LLMOutOfMemoryError, match=f"pinning {LARGE} bytes failed") as caught:
        PinnedMemory().allocate(1, (LARGE,), torch.uint8)
    assert caught.value.requested_bytes == LARGE
    with pytest.raises(LLMOutOfMemoryError, match="pinning"):
        allocate_pinned_bytes(LARGE)
    faults.reset()
    (tensor,) = PinnedMemory().allocate(1, (LARGE,), torch.uint8).tensors
    assert tensor.is_pinned()


def test_pinning_failed_for_somebody_else() -> None:
    """torch_npu keeps the tensor at address 0 for the next of its size."""
    faults.fail("aclrtMallocHost")
    assert torch.empty(LARGE, dtype=torch.uint8, pin_memory=True).data_ptr() == 0
    assert torch.empty(LARGE, dtype=torch.uint8, pin_memory=True).data_ptr() == 0
    (tensor,) = PinnedMemory().allocate(1, (LARGE,), torch.uint8).tensors
    assert tensor.data_ptr() != 0
    assert tensor.is_pinned()


def test_init_without_room_for_the_pools(instance_factory) -> None:
    faults.fail("aclrtMallocHost", times=0)
    with pytest.raises(LLMOutOfMemoryError, match="pinning"):
        instance_factory(host_pool=LARGE)
    faults.reset()
    faults.fail("aclrtMalloc", times=0)
    faults.fail("aclrtMallocAlign32", times=0)
    with pytest.raises(LLMOutOfMemoryError, match="bytes of npu:0"):
        instance_factory(pool=LARGE)
    faults.reset()
    manager = instance_factory(pool=LARGE, host_pool=LARGE).cache_manager
    assert manager.allocate_cache(CacheDesc(1, [4], DataType.DT_INT8)).device.type == "npu"


@pytest.mark.parametrize(
    ("code", "error"), [(207001, LLMOutOfMemoryError), (DEVICE_FAULT, LLMDeviceError)]
)
def test_allocation_fails(
    device: torch.device, npu: Any, code: int, error: type[Exception]
) -> None:
    before = npu.memory_stats(0)["allocated_bytes.all.current"]
    for function in ("aclrtMalloc", "aclrtMallocAlign32"):
        faults.fail(function, code=code, times=0)
    with pytest.raises(error, match="npu:0"):
        NpuMemory(device).allocate(1, (LARGE,), torch.uint8)
    faults.reset()
    assert npu.memory_stats(0)["allocated_bytes.all.current"] == before
    NpuMemory(device).allocate(1, (LARGE,), torch.uint8)


def test_waiting_for_the_device_fails(device: torch.device) -> None:
    arena = NpuDevice(device, "").memory(PoolConfig(1 << 20))
    faults.fail("aclrtSynchronizeStreamWithTimeout", code=DEVICE_FAULT)
    faults.fail("aclrtSynchronizeStream", code=DEVICE_FAULT)
    with pytest.raises(LLMDeviceError, match="npu:0: waiting for the current stream failed"):
        NpuMemory(device).allocate(1, (4,), torch.uint8)
    faults.reset()
    for function in ("aclrtSynchronizeDevice", "aclrtSynchronizeDeviceWithTimeout"):
        faults.fail(function, code=DEVICE_FAULT)
    with pytest.raises(LLMDeviceError, match="npu:0: waiting for the device failed"):
        arena.allocate(1, (4,), torch.uint8)
    faults.reset()
    assert arena.allocate(1, (1 << 20,), torch.uint8).tensors  # nothing was kept


def test_a_device_that_is_taken_away(device: torch.device, instance_factory) -> None:
    tensor = torch.zeros(16, device=device)
    faults.take_device_away(0)
    with pytest.raises(LLMDeviceError):
        NpuMemory(device).allocate(1, (LARGE,), torch.uint8)
    for look in (probe, check_alive):
        with pytest.raises((LLMDeviceError, LLMParamError)):
            look([tensor.data_ptr()], 64, device)
    choose_device("npu", 0).enter_thread()  # says so in the log, and no more
    with pytest.raises(LLMDeviceError):
        instance_factory(pool=LARGE)


def test_a_runtime_that_does_not_know_addresses(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch_npu's own allocator still does."""
    monkeypatch.setattr("llm_datadist_torch.memory.npu_address._get_attributes", lambda: None)
    tensor = torch.zeros(1024, dtype=torch.uint8, device=device)
    probe([tensor.data_ptr()], 1024, device)
    check_alive([tensor.data_ptr()], 1024, device)
    host = torch.zeros(1024, dtype=torch.uint8)
    for look in (probe, check_alive):
        with pytest.raises(LLMParamError, match="not memory of torch_npu's"):
            look([host.data_ptr()], 1024, device)

# SPDX-License-Identifier: Apache-2.0
"""What torch_npu programs may rely on, in one process: memory, copies, streams, events, devices."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable

import pytest
import torch

import ascend_sim
from ascend_sim import faults

MIB = 2**20
runtime = ctypes.CDLL("libascendcl.so")


def device_bytes(address: int, count: int) -> bytes:
    """What is at a device address now, without any synchronisation."""
    out = ctypes.create_string_buffer(count)
    size, source = ctypes.c_size_t(count), ctypes.c_void_p(address)
    assert runtime.aclrtMemcpy(out, size, source, size, 2) == 0
    return out.raw


def check_it_is_simulated():
    assert ascend_sim.is_active()
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 2
    assert torch.npu.get_device_name(0) == "Ascend910B1"
    properties = torch.npu.get_device_properties(0)
    assert properties.total_memory == 2**31
    assert (properties.cube_core_num, properties.vector_core_num) == (24, 48)


def check_allocation_is_counted():
    gc.collect()
    torch.npu.empty_cache()
    before = torch.npu.memory_stats()["allocated_bytes.all.current"]
    free = torch.npu.mem_get_info()[0]
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="npu:0")
    assert torch.npu.memory_stats()["allocated_bytes.all.current"] - before >= 64 * MIB
    assert free - torch.npu.mem_get_info()[0] >= 64 * MIB
    assert tensor.data_ptr() % (2 * MIB) == 0
    del tensor
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == free


def check_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.empty(3 * 2**30, dtype=torch.uint8, device="npu:0")
    some = torch.empty(128 * MIB, dtype=torch.uint8, device="npu:0")
    most = 2**31 - 128 * MIB + 1
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(most, dtype=torch.uint8, device="npu:0")
    # Each device has its own.
    assert torch.npu.mem_get_info(1)[0] > most
    del some
    torch.npu.empty_cache()


def check_fresh_and_freed_memory_is_poisoned():
    torch.npu.empty_cache()
    tensor = torch.empty(4 * MIB, dtype=torch.uint8, device="npu:0")
    assert set(tensor.cpu().tolist()) == {0xA5}
    tensor.zero_()
    torch.npu.synchronize()
    address = tensor.data_ptr()
    assert device_bytes(address, 4) == bytes(4)
    alias = runtime.ascend_sim_alias
    alias.restype = ctypes.c_void_p
    late = alias(ctypes.c_void_p(address), ctypes.c_size_t(4))
    del tensor
    torch.npu.empty_cache()
    assert alias(ctypes.c_void_p(address), ctypes.c_size_t(4)) is None
    assert ctypes.string_at(late, 4) == b"\xa5" * 4


def check_copies():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        host = (torch.arange(240) % 2).to(dtype).reshape(4, 5, 12)
        there = host.to("npu:0")
        assert torch.equal(there.cpu(), host)
        assert torch.equal(there.clone().cpu(), host)
        assert torch.equal(there.to("npu:1").cpu(), host)
        assert torch.equal(there.transpose(0, 2).cpu(), host.transpose(0, 2))
        back = torch.empty_like(host, pin_memory=True)
        back.copy_(there, non_blocking=True)
        torch.npu.synchronize()
        assert torch.equal(back, host)


def check_pinned_memory():
    assert torch.empty(8, pin_memory=True).is_pinned()
    plain = torch.arange(8)
    assert not plain.is_pinned()
    assert torch.equal(plain.pin_memory(), plain)


def check_a_stream_is_in_order_and_asynchronous():
    stream = torch.npu.Stream()
    host = torch.full((1000,), 7.0).pin_memory()
    with torch.npu.stream(stream):
        there = host.to("npu:0", non_blocking=True)
        for _ in range(20):
            there.add_(1)
    stream.synchronize()
    assert set(there.cpu().tolist()) == {27.0}


def check_events():
    first, second = torch.npu.Stream(), torch.npu.Stream()
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    tensor = torch.zeros(1000, device="npu:0")
    torch.npu.synchronize()
    with torch.npu.stream(first):
        start.record()
        tensor.add_(1)
        end.record()
    with torch.npu.stream(second):
        end.wait()
        tensor.mul_(10)
    second.synchronize()
    assert start.query()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    assert set(tensor.cpu().tolist()) == {10.0}


def check_a_wait_is_for_the_recording_of_that_moment():
    first, second = torch.npu.Stream(), torch.npu.Stream()
    event = torch.npu.Event()
    tensor = torch.zeros(100, device="npu:0")
    copy = torch.zeros(100, device="npu:0")
    torch.npu.synchronize()
    for value in range(1, 5):
        with torch.npu.stream(first):
            tensor.fill_(value)
            event.record()
        with torch.npu.stream(second):
            event.wait()
            copy.copy_(tensor)
            done = torch.npu.Event()
            done.record()
        first.wait_event(done)
    torch.npu.synchronize()
    assert set(copy.cpu().tolist()) == {4.0}


def check_polling_ends():
    stream = torch.npu.Stream()
    event = torch.npu.Event()
    with torch.npu.stream(stream):
        tensor = torch.ones(10, device="npu:0") + 1
        event.record()
    while not event.query():
        pass
    while not stream.query():
        pass
    assert tensor.cpu()[0] == 2


def check_threads():
    failures: list[str] = []

    def work(number: int) -> None:
        try:
            device = f"npu:{number % 2}"
            torch.npu.set_device(device)
            stream = torch.npu.Stream()
            with torch.npu.stream(stream):
                tensor = torch.full((1000,), float(number), device=device)
                for _ in range(20):
                    tensor.add_(1)
            stream.synchronize()
            assert set(tensor.cpu().tolist()) == {number + 20.0}
        except Exception as error:  # noqa: BLE001 (whatever it is, the test says it)
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def check_a_thread_has_no_device_before_it_sets_one():
    codes: list[int] = []
    number = ctypes.c_int32()

    def call() -> None:
        codes.append(runtime.aclrtGetDevice(ctypes.byref(number)))
        codes.append(runtime.aclrtSetDevice(1))
        codes.append(runtime.aclrtGetDevice(ctypes.byref(number)))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert (codes, number.value) == ([107002, 0, 0], 1)


def on_device_0(call: Callable[[], object]) -> None:
    torch.npu.set_device(0)
    try:
        call()
    finally:
        faults.reset()


def check_fault_in_allocation():
    def allocate() -> torch.Tensor:
        return torch.empty(256 * MIB, dtype=torch.uint8, device="npu:0")

    def fail_once() -> None:
        torch.npu.empty_cache()
        # torch_npu gives its cache back and tries once more.
        for function in ("aclrtMallocAlign32", "aclrtMallocPhysical"):
            faults.fail(function, times=2)
        with pytest.raises(torch.OutOfMemoryError):
            allocate()
        faults.reset()
        assert allocate().numel() == 256 * MIB

    on_device_0(fail_once)


def check_fault_of_the_kth_call():
    def call() -> int:
        count = ctypes.c_uint32()
        return runtime.aclrtGetDeviceCount(ctypes.byref(count))

    before = faults.count("aclrtGetDeviceCount")
    faults.fail("aclrtGetDeviceCount", 3, code=507899)
    assert [call() for _ in range(4)] == [0, 0, 507899, 0]
    assert faults.count("aclrtGetDeviceCount") == before + 4
    faults.fail("aclrtGetDeviceCount", 2, code=5, times=0)
    assert [call() for _ in range(3)] == [0, 5, 5]
    faults.reset()
    assert call() == 0


def check_fault_of_a_task_in_a_stream():
    def fail_task() -> None:
        host = torch.ones(100).pin_memory()
        torch.npu.synchronize()
        faults.fail("task.aclrtMemcpyAsync", code=507899)
        host.to("npu:0", non_blocking=True)
        with pytest.raises(RuntimeError, match=r"507899|aclrtMemcpyAsync"):
            torch.npu.synchronize()
        assert torch.equal(host.to("npu:0").cpu(), host)

    on_device_0(fail_task)


def check_a_delay():
    faults.delay("task.aclrtMemcpyAsync", 0.05)
    there = torch.ones(100).pin_memory().to("npu:0", non_blocking=True)
    assert set(there.cpu().tolist()) == {1.0}
    faults.reset()


def check_wrong_faults_are_refused():
    with pytest.raises(ValueError, match="no failure"):
        faults.fail("aclrtMalloc", code=0)
    with pytest.raises(ValueError, match="first call is 1"):
        faults.fail("aclrtMalloc", 0)
    with pytest.raises(ValueError, match="no name"):
        faults.fail("a;b")
    with pytest.raises(ValueError, match="no delay"):
        faults.delay("aclrtMalloc", 0)


def check_a_device_that_is_taken_away():
    there = torch.ones(4, device="npu:1")
    torch.npu.synchronize(1)
    faults.take_device_away(1)
    try:
        with pytest.raises(RuntimeError, match=r"507010|taken away"):
            there.cpu()
        assert torch.ones(4, device="npu:0").cpu().sum() == 4
    finally:
        faults.reset()

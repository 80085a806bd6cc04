# SPDX-License-Identifier: Apache-2.0
"""The simulated AscendCL by itself: what torch_npu doesn't use, or only by chance."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from ctypes import byref, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 2**20
H2H, H2D, D2H, D2D, DEFAULT = range(5)
PARAM_INVALID, NOT_SUPPORTED, OUT_OF_MEMORY = 107000, 207000, 207001
INVALID_HANDLE, NO_PERMISSION, CONTEXT_NULL = 107017, 207006, 107002
IPC_ERROR = 507022

acl = ctypes.CDLL("libascendcl.so")
acl.aclGetRecentErrMsg.restype = c_char_p


class Location(ctypes.Structure):
    _fields_ = (("id", c_uint32), ("type", c_uint32))


class BatchAttribute(ctypes.Structure):
    _fields_ = (("dst", Location), ("src", Location), ("reserved", ctypes.c_uint8 * 16))


class PointerAttributes(ctypes.Structure):
    _fields_ = (("location", Location), ("page_size", c_uint32), ("reserved", c_uint32 * 4))


class PhysicalProperties(ctypes.Structure):
    _fields_ = (
        ("handle_type", c_uint32),
        ("allocation_type", c_uint32),
        ("attribute", c_uint32),
        ("location", Location),
        ("reserve", c_uint64),
    )


def ok(code: int) -> None:
    assert code == 0, acl.aclGetRecentErrMsg()


def allocate(nbytes: int, device: int = 0) -> int:
    address = c_void_p()
    ok(acl.aclrtSetDevice(device))
    ok(acl.aclrtMalloc(byref(address), c_size_t(nbytes), 0))
    assert address.value
    return address.value


def pinned(data: bytes) -> int:
    address = c_void_p()
    ok(acl.aclrtMallocHost(byref(address), c_size_t(len(data))))
    assert address.value
    ctypes.memmove(address.value, data, len(data))
    return address.value


def copy(dst: int, src: int, count: int, kind: int = DEFAULT, limit: int | None = None) -> int:
    room = c_size_t(count if limit is None else limit)
    return acl.aclrtMemcpy(c_void_p(dst), room, c_void_p(src), c_size_t(count), kind)


def copy_async(dst: int, src: int, count: int, kind: int, stream: c_void_p) -> int:
    size = c_size_t(count)
    return acl.aclrtMemcpyAsync(c_void_p(dst), size, c_void_p(src), size, kind, stream)


def write(address: int, data: bytes) -> None:
    held = ctypes.create_string_buffer(data, len(data))
    ok(copy(address, ctypes.addressof(held), len(data), H2D))


def read(address: int, count: int) -> bytes:
    held = ctypes.create_string_buffer(count)
    ok(copy(ctypes.addressof(held), address, count, D2H))
    return held.raw


def check_copies_out_of_range_are_refused():
    address, other = allocate(1000), allocate(1000)
    host = pinned(bytes(1000))
    assert copy(address, host, 1001, H2D) == PARAM_INVALID
    assert copy(address + 1, host, 1000, H2D) == PARAM_INVALID
    assert copy(address - 1, host, 10, H2D) == PARAM_INVALID
    assert copy(address, other + 999, 2, D2D) == PARAM_INVALID
    assert copy(address, host, 10, H2D, limit=9) == PARAM_INVALID
    assert b"limit 9" in acl.aclGetRecentErrMsg()
    assert copy(address, host, 10, D2H) == PARAM_INVALID
    assert copy(address, 0, 10, H2D) == PARAM_INVALID
    assert copy(address, 4096, 10, H2D) == PARAM_INVALID  # no memory there on the host
    ok(copy(address, 0, 0, H2D))
    ok(acl.aclrtFree(c_void_p(other)))
    assert copy(address, other, 10, D2D) == PARAM_INVALID
    assert acl.aclrtFree(c_void_p(other)) == PARAM_INVALID
    assert acl.aclrtFree(c_void_p(address + 2 * MIB)) == PARAM_INVALID
    ok(acl.aclrtMemset(c_void_p(address), c_size_t(1000), 7, c_size_t(1000)))
    assert acl.aclrtMemset(c_void_p(address), c_size_t(2000), 7, c_size_t(1001)) == PARAM_INVALID
    assert read(address, 1000) == b"\7" * 1000


def check_memory_freed_under_a_task_is_an_error():
    address, other, stream = allocate(100), allocate(100), c_void_p()
    ok(acl.aclrtCreateStream(byref(stream)))
    ok(copy_async(address, other, 100, D2D, stream))
    ok(acl.aclrtFree(c_void_p(other)))
    assert acl.aclrtSynchronizeStream(stream) != 0
    assert b"was freed before it ran" in acl.aclGetRecentErrMsg()
    ok(acl.aclrtSynchronizeStream(stream))
    host = pinned(bytes(100))
    ok(copy_async(address, host, 100, H2D, stream))
    ok(acl.aclrtFreeHost(c_void_p(host)))
    assert acl.aclrtSynchronizeStream(stream) != 0


def check_asynchronous_copies():
    address, stream = allocate(100), c_void_p()
    ok(acl.aclrtCreateStream(byref(stream)))
    write(address, b"a" * 100)
    host = pinned(b"b" * 100)
    assert copy_async(host, host, 10, H2H, stream) == NOT_SUPPORTED
    ok(copy_async(address, host, 100, H2D, stream))
    assert read(address, 100) == b"a" * 100, "a copy from pinned memory ran before anybody waited"
    ok(acl.aclrtSynchronizeStream(stream))
    assert read(address, 100) == b"b" * 100
    plain = ctypes.create_string_buffer(b"c" * 100, 100)
    ok(copy_async(address, ctypes.addressof(plain), 100, H2D, stream))
    assert read(address, 100) == b"c" * 100, "a copy from pageable memory is synchronous"


def check_two_dimensional_copies():
    address, stream = allocate(100), c_void_p()
    ok(acl.aclrtCreateStream(byref(stream)))
    write(address, bytes(range(100)))
    host = pinned(bytes(50))
    sizes = [c_size_t(size) for size in (5, 10, 3, 10)]
    dst_row_stride_bytes, src_row_stride_bytes, width, height = sizes
    arguments = (
        c_void_p(host),
        dst_row_stride_bytes,
        c_void_p(address),
        src_row_stride_bytes,
        width,
        height,
        D2H,
    )
    ok(acl.aclrtMemcpy2dAsync(*arguments, stream))
    ok(acl.aclrtSynchronizeStream(stream))
    rows = [bytes(range(10 * row, 10 * row + 3)) + bytes(2) for row in range(10)]
    assert ctypes.string_at(host, 50) == b"".join(rows)
    ok(acl.aclrtMemcpy2d(*arguments))
    assert acl.aclrtMemcpy2d(*arguments[:4], c_size_t(6), height, D2H) == PARAM_INVALID
    assert acl.aclrtMemcpy2d(*arguments[:5], c_size_t(11), D2H) == PARAM_INVALID


def batch(count: int, dsts: list[int], srcs: list[int], to_device: bool, numbers: list[int]):
    host, device = Location(0, 0), Location(0, 1)
    attribute = BatchAttribute(device, host) if to_device else BatchAttribute(host, device)
    array = c_void_p * count
    sizes = (c_size_t * count)(*[4] * count)
    attributes = (BatchAttribute * len(numbers))(*[attribute] * len(numbers))
    indexes = (c_size_t * len(numbers))(*numbers)
    return (
        array(*dsts),
        sizes,
        array(*srcs),
        sizes,
        c_size_t(count),
        attributes,
        indexes,
        c_size_t(len(numbers)),
    )


def check_batches():
    address, stream, failed = allocate(4 * 4097), c_void_p(), c_size_t()
    ok(acl.aclrtCreateStream(byref(stream)))
    host = pinned(bytes(range(256)) * 65)
    there = [address + 4 * i for i in range(4097)]
    here = [host + 4 * i for i in range(4097)]
    ok(acl.aclrtMemcpyBatch(*batch(4096, there[:4096], here[:4096], True, [0, 7]), byref(failed)))
    assert read(address, 4 * 4096) == (bytes(range(256)) * 65)[: 4 * 4096]
    whole = batch(4097, there, here, True, [0])
    assert acl.aclrtMemcpyBatch(*whole, byref(failed)) == PARAM_INVALID
    ok(acl.aclrtMemcpyBatchAsync(*whole, byref(failed), stream))
    ok(acl.aclrtSynchronizeStream(stream))
    assert read(address, 4 * 4097) == (bytes(range(256)) * 65)[: 4 * 4097]
    wrong_way = batch(2, there[:2], here[:2], False, [0])
    assert acl.aclrtMemcpyBatch(*wrong_way, byref(failed)) == PARAM_INVALID
    assert failed.value == 0
    outside = batch(2, [address, address + 4 * 4097], here[:2], True, [0])
    assert acl.aclrtMemcpyBatch(*outside, byref(failed)) == PARAM_INVALID
    assert failed.value == 1


def check_pointer_attributes():
    device, host = allocate(100), pinned(bytes(100))
    plain = ctypes.create_string_buffer(10)
    found = PointerAttributes()
    for address, kind in (
        (device + 99, 1),
        (host, 0),
        (ctypes.addressof(plain), 2),
        (device + 100, 2),
    ):
        ok(acl.aclrtPointerGetAttributes(c_void_p(address), byref(found)))
        assert found.location.type == kind
    ok(acl.aclrtHostRegisterV2(plain, c_uint64(10), c_uint32(0)))
    ok(acl.aclrtPointerGetAttributes(plain, byref(found)))
    assert found.location.type == 0
    ok(acl.aclrtHostUnregister(plain))


IMPORT = """
import ctypes, sys
from tests.runtime_checks import *
key, flags, peer = sys.argv[1].encode(), c_uint64(int(sys.argv[2])), int(sys.argv[3])
ok(acl.aclrtSetDevice(1))
if peer >= 0:
    ok(acl.aclrtDeviceEnablePeerAccess(c_int32(peer), c_uint32(0)))
print(bare_tgid(), flush=True)
sys.stdin.readline()
address = c_void_p()
code = acl.aclrtIpcMemImportByKey(byref(address), key, flags)
print("imported", code, flush=True)
if code == 0:
    again = c_void_p()
    assert acl.aclrtIpcMemImportByKey(byref(again), key, flags) == PARAM_INVALID
    assert acl.aclrtFree(address) == PARAM_INVALID
    mine = allocate(5, device=1)
    print(copy(mine, address.value + 100, 5, D2D), flush=True)
    if flags.value or peer >= 0:
        print(read(mine, 5).decode(), flush=True)
        write(address.value + 100, b"reply")
    print("open", flush=True)
    sys.stdin.readline()
    ok(acl.aclrtIpcMemClose(key))
    assert acl.aclrtIpcMemClose(key) == INVALID_HANDLE
    print(acl.aclrtMemset(address, c_size_t(5), 0, c_size_t(5)), flush=True)
    sys.stdin.readline()
"""


class Importer:
    """A process on device 1 that opens a key: says its number, waits, and tells what it got."""

    def __init__(self, key: bytes, flags: int = 1, peer: int = -1) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", IMPORT, key.decode(), str(flags), str(peer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tgid = int(self.line())

    def line(self) -> str:
        assert self.child.stdout
        return self.child.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.child.stdin
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.communicate(timeout=60)


def bare_tgid() -> int:
    found = c_int32()
    ok(acl.aclrtDeviceGetBareTgid(byref(found)))
    return found.value


def try_export(address: int, size: int, flags: int = 0, length: int = 65) -> tuple[int, bytes]:
    key = ctypes.create_string_buffer(80)
    arguments = (c_void_p(address), c_size_t(size), key, c_size_t(length), c_uint64(flags))
    return acl.aclrtIpcMemGetExportKey(*arguments), key.value


def export(address: int, size: int, flags: int = 0) -> bytes:
    code, key = try_export(address, size, flags)
    ok(code)
    assert 0 < len(key) < 65
    return key


def allow(key: bytes, *numbers: int) -> int:
    pids = (c_int32 * len(numbers))(*numbers)
    return acl.aclrtIpcMemSetImportPid(key, pids, c_size_t(len(numbers)))


def check_keys_of_other_processes():
    address = allocate(3 * MIB)
    write(address + 100, b"hello")
    key = export(address, 3 * MIB)
    with Importer(key) as other:
        ok(allow(key, other.tgid))
        other.go_on()
        assert [other.line() for _ in range(4)] == ["imported 0", "0", "hello", "open"]
        assert read(address + 100, 5) == b"reply"
        # Who imported it closes it first.
        assert acl.aclrtIpcMemClose(key) == IPC_ERROR
        assert acl.aclrtFree(c_void_p(address)) == IPC_ERROR
        other.go_on()
        assert other.line() == str(PARAM_INVALID)
        ok(acl.aclrtIpcMemClose(key))
        assert acl.aclrtIpcMemClose(key) == INVALID_HANDLE
        ok(acl.aclrtFree(c_void_p(address)))


IMPORT_OFTEN = """
import sys
from pathlib import Path
from tests.runtime_checks import *
key, counts = sys.argv[1].encode(), []
ok(acl.aclrtSetDevice(0))
for _ in range(40):
    ok(acl.aclrtIpcMemImportByKey(byref(c_void_p()), key, c_uint64(1)))
    ok(acl.aclrtIpcMemClose(key))
    counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
print(counts[-1] - counts[19])
"""


def check_imports_that_are_closed_keep_no_mappings():
    address = allocate(20 * MIB)
    key = export(address, 20 * MIB, flags=1)
    command = [sys.executable, "-c", IMPORT_OFTEN, key.decode()]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(grown) < 20
    ok(acl.aclrtFree(c_void_p(address)))


def check_an_importer_that_ends_lets_go():
    address = allocate(200)
    write(address + 100, b"hello")
    key = export(address, 200, flags=1)
    with Importer(key) as other:
        other.go_on()
        assert [other.line() for _ in range(4)][-1] == "open"
        assert acl.aclrtFree(c_void_p(address)) == IPC_ERROR
        other.child.kill()
    # Memory takes its keys with it.
    ok(acl.aclrtFree(c_void_p(address)))
    assert acl.aclrtIpcMemClose(key) == INVALID_HANDLE


def check_keys_are_for_whom_they_were_made():
    address = allocate(5000)
    key = export(address, 5000)
    assert allow(key) == PARAM_INVALID
    assert allow(b"nonsense", 1) == INVALID_HANDLE
    assert bare_tgid() != os.getpid()
    for allowed in (None, "getpid"):
        with Importer(key) as other:
            if allowed:
                ok(allow(key, other.child.pid))
            other.go_on()
            assert other.line() == f"imported {NO_PERMISSION}"
    ok(acl.aclrtIpcMemClose(key))
    with Importer(key) as other:
        other.go_on()
        assert other.line() == f"imported {INVALID_HANDLE}"
    out = c_void_p()
    assert acl.aclrtIpcMemImportByKey(byref(out), b"nonsense", c_uint64(0)) == PARAM_INVALID
    key = export(address, 5000)
    assert acl.aclrtIpcMemImportByKey(byref(out), key, c_uint64(0)) == PARAM_INVALID
    ok(acl.aclrtFree(c_void_p(address)))


def check_only_whole_allocations_can_be_exported():
    address = allocate(4 * MIB)
    for start, size, flags, length in (
        (address, 2 * MIB, 0, 65),
        (address, 4 * MIB + 1, 0, 65),
        (address + 512, 4 * MIB - 512, 0, 65),
        (address, 4 * MIB, 2, 65),
        (address, 4 * MIB, 0, 64),
        (address, 4 * MIB, 0, 66),
        (pinned(bytes(100)), 100, 0, 65),
    ):
        assert try_export(start, size, flags, length)[0] == PARAM_INVALID
    ok(acl.aclrtSetDevice(1))
    assert try_export(address, 4 * MIB)[0] == CONTEXT_NULL
    ok(acl.aclrtSetDevice(0))
    ok(acl.aclrtFree(c_void_p(address)))
    assert try_export(address, 4 * MIB)[0] == PARAM_INVALID
    base, handle = c_void_p(), c_void_p()
    wanted = PhysicalProperties(location=Location(0, 1))
    size = c_size_t(2 * MIB)
    ok(acl.aclrtReserveMemAddress(byref(base), size, c_size_t(0), None, c_uint64(0)))
    ok(acl.aclrtMallocPhysical(byref(handle), size, byref(wanted), c_uint64(0)))
    ok(acl.aclrtMapMem(base, size, c_size_t(0), handle, c_uint64(0)))
    assert base.value
    assert try_export(base.value, 2 * MIB)[0] == NOT_SUPPORTED
    ok(acl.aclrtUnmapMem(base))
    ok(acl.aclrtFreePhysical(handle))
    ok(acl.aclrtReleaseMemAddress(base))


def check_imported_memory_of_another_device_needs_peer_access():
    address = allocate(200)
    write(address + 100, b"hello")
    for peer, seen in ((-1, [str(NOT_SUPPORTED), "open"]), (0, ["0", "hello", "open"])):
        key = export(address, 200, flags=1)
        with Importer(key, flags=0, peer=peer) as other:
            other.go_on()
            assert other.line() == "imported 0"
            assert [other.line() for _ in seen] == seen
    here, there = allocate(8), allocate(8, device=1)
    for dst, src in ((here, there), (there, here)):
        assert copy(dst, src, 8, D2D) == NOT_SUPPORTED
    ok(acl.aclrtSetDevice(0))
    assert acl.aclrtDeviceEnablePeerAccess(c_int32(0), c_uint32(0)) == PARAM_INVALID
    ok(acl.aclrtDeviceEnablePeerAccess(c_int32(1), c_uint32(0)))
    ok(copy(here, there, 8, D2D))
    ok(acl.aclrtDeviceDisablePeerAccess(c_int32(1)))
    assert copy(here, there, 8, D2D) == NOT_SUPPORTED
    for each in (address, here, there):
        ok(acl.aclrtFree(c_void_p(each)))


def check_addresses_apart_from_memory():
    ok(acl.aclrtSetDevice(0))
    base, handle = c_void_p(), c_void_p()
    wanted = PhysicalProperties(location=Location(0, 1))
    reserve = (byref(base), c_size_t(8 * MIB), c_size_t(0), None, c_uint64(0))
    ok(acl.aclrtReserveMemAddress(*reserve))
    size = c_size_t(2 * MIB)
    ok(acl.aclrtMallocPhysical(byref(handle), size, byref(wanted), c_uint64(0)))
    assert base.value
    assert copy(base.value, base.value, 1, D2D) == PARAM_INVALID
    for place in (0, 2 * MIB):
        target = c_void_p(base.value + place)
        ok(acl.aclrtMapMem(target, size, c_size_t(0), handle, c_uint64(0)))
    # The same memory at two addresses, side by side: one copy may run over both.
    write(base.value + 2 * MIB - 2, b"wxyz")
    assert read(base.value, 2) == b"yz"
    mapped_twice = acl.aclrtMapMem(base, size, c_size_t(0), handle, c_uint64(0))
    assert mapped_twice == PARAM_INVALID
    ok(acl.aclrtUnmapMem(base))
    assert copy(base.value, base.value + 2 * MIB, 1, D2D) == PARAM_INVALID
    ok(acl.aclrtFreePhysical(handle))
    assert acl.aclrtFreePhysical(handle) == INVALID_HANDLE
    ok(acl.aclrtReleaseMemAddress(base))
    ok(acl.aclrtMallocPhysical(byref(handle), size, byref(wanted), c_uint64(0)))
    shared, other = c_uint64(), c_void_p()
    ok(acl.aclrtMemExportToShareableHandle(handle, 0, c_uint64(0), byref(shared)))
    ok(acl.aclrtMemImportFromShareableHandle(shared, c_int32(0), byref(other)))
    ok(acl.aclrtFreePhysical(other))
    ok(acl.aclrtFreePhysical(handle))


def check_events_that_wait_for_their_first_recording():
    ok(acl.aclrtSetDevice(0))
    first, second, event = c_void_p(), c_void_p(), c_void_p()
    ok(acl.aclrtCreateStream(byref(first)))
    ok(acl.aclrtCreateStream(byref(second)))
    ok(acl.aclrtCreateEventWithFlag(byref(event), c_uint32(1)))
    ok(acl.aclrtStreamWaitEvent(second, event))
    assert acl.aclrtSynchronizeStreamWithTimeout(second, c_int32(50)) == 507046
    ok(acl.aclrtRecordEvent(event, first))
    ok(acl.aclrtSynchronizeStream(second))
    ok(acl.aclrtResetEvent(event, first))
    ok(acl.aclrtStreamWaitEvent(second, event))
    assert acl.aclrtSynchronizeStreamWithTimeout(second, c_int32(50)) == 507046
    ok(acl.aclrtDestroyStreamForce(second))
    assert acl.aclrtSynchronizeStream(second) == INVALID_HANDLE
    ok(acl.aclrtDestroyEvent(event))
    assert acl.aclrtDestroyEvent(event) == INVALID_HANDLE
    assert acl.aclrtRecordEvent(event, first) == INVALID_HANDLE


def check_a_process_may_end_with_tasks_in_a_stream():
    address, stream = allocate(100), c_void_p()
    ok(acl.aclrtCreateStream(byref(stream)))
    host = pinned(bytes(100))
    ok(copy_async(address, host, 100, H2D, stream))

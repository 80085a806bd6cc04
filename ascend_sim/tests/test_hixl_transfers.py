# SPDX-License-Identifier: Apache-2.0
"""Bytes moved by the simulated module ``hixl`` between two processes, and within one."""

from __future__ import annotations

import pytest

from tests.hixl_peers import free_name, pattern, peers

pytestmark = pytest.mark.needs_torch_npu

SCHEDULERS = ["lazy", "random", "inline"]
KINDS = ["Host", "Device"]
SIZE = 1 << 20


@pytest.fixture(scope="module", params=SCHEDULERS)
def processes(request):
    with peers(request.param) as both:
        yield both


@pytest.fixture
def pair(processes):
    yield processes
    for peer in processes:
        peer("reset()")


@pytest.fixture(scope="module")
def lazy_processes():
    with peers() as both:
        yield both


@pytest.fixture
def lazy_pair(lazy_processes):
    yield lazy_processes
    for peer in lazy_processes:
        peer("reset()")


def linked(pair, *, near="Host", far="Host", near_options=None, register=True):
    """A linked pair of engines with a buffer each; returns the two processes and far's address."""
    here, there = pair
    remote = free_name()
    there(
        f"e = engine(name); m = {far}(data); handle = register(e, m)",
        name=remote,
        data=pattern(1, SIZE),
    )
    here(
        f"e = engine('127.0.0.1', **options); m = {near}(data)",
        options=near_options or {},
        remote=remote,
        data=pattern(100, SIZE),
    )
    if register:
        here("handle = register(e, m)")
    assert here("e.connect(remote)") == 0
    return here, there, there("m.addr")


@pytest.mark.parametrize("near", KINDS)
@pytest.mark.parametrize("far", KINDS)
def test_read_and_write(pair, near, far):
    here, there, addr = linked(pair, near=near, far=far)
    pieces = "descs((m.addr + 5, far + 64, 1000), (m.addr + 4096, far + 8192, SIZE - 8192))"
    names = {"far": addr, "SIZE": SIZE}
    expected = bytearray(pattern(100, SIZE))
    expected[5:1005] = pattern(1, SIZE)[64:1064]
    expected[4096 : SIZE - 4096] = pattern(1, SIZE)[8192:]
    assert here(f"e.transfer_sync(remote, hixl.READ, {pieces})", **names) == 0
    assert here("m.data") == bytes(expected)
    here("m.data = data" if near == "Device" else "ctypes.memmove(m.addr, data, SIZE)")
    assert here("m.data") == pattern(100, SIZE)
    expected = bytearray(pattern(1, SIZE))
    expected[64:1064] = pattern(100, SIZE)[5:1005]
    expected[8192:] = pattern(100, SIZE)[4096 : SIZE - 4096]
    assert here(f"s, r = e.transfer_async(remote, hixl.WRITE, {pieces}); s, end_of(e, r)") == (
        0,
        (0, "COMPLETED"),
    )
    assert there("m.data") == bytes(expected)
    assert here("m.data") == pattern(100, SIZE)


def test_many_small_pieces_that_cross(pair):
    here, _, addr = linked(pair)
    code = """
    pieces = descs(*((m.addr + 512 * (2047 - i), far + 512 * i, 512) for i in range(2048)))
    s, r = e.transfer_async(remote, hixl.READ, pieces)
    s, end_of(e, r), m.data
    """
    status, end, data = here(code, far=addr)
    assert (status, end) == (0, (0, "COMPLETED"))
    source = pattern(1, SIZE)
    assert data == b"".join(source[512 * i : 512 * i + 512] for i in reversed(range(2048)))


def test_two_engines_of_one_process(pair):
    here, _ = pair
    code = """
    a, b = engine(name), engine(other)
    left, right = Device(bytes(4096)), Device(data[:4096], device=0)
    register(a, left); register(b, right)
    statuses = a.connect(other), a.connect(name)
    piece = descs((left.addr, right.addr, 4096))
    statuses, a.transfer_sync(other, hixl.READ, piece), left.data
    """
    statuses, status, data = here(code, name=free_name(), other=free_name(), data=pattern(9, SIZE))
    assert statuses == (0, 103900), "not to itself"
    assert (status, data) == (0, pattern(9, SIZE)[:4096])


def test_two_engines_on_different_devices(pair):
    here, there = pair
    remote = free_name()
    code = (
        "x = Device(data, device=1); e = hixl.Hixl(); engines.append(e); runtime.aclrtSetDevice(1)"
    )
    there(code, data=pattern(5, SIZE))
    there("assert e.initialize(name) == 0; register(e, x)", name=remote)
    code = "e = engine('127.0.0.1'); m = Device(bytes(SIZE)); register(e, m); e.connect(remote)"
    assert here(code, remote=remote, SIZE=SIZE) == 0
    read = "e.transfer_sync(remote, hixl.READ, descs((m.addr, far, SIZE)))"
    assert here(read, far=there("x.addr")) == 0
    assert here("m.data") == pattern(5, SIZE)
    there("e.finalize(); runtime.aclrtSetDevice(0)")


def test_device_memory_of_another_device_is_refused(lazy_pair):
    here, _ = lazy_pair
    here("e = engine('127.0.0.1'); m = Device(bytes(4096), device=1)")
    assert here("e.register_mem(hixl.MemDesc(m.addr, 4096), hixl.MEM_DEVICE)") == (503900, 0)
    assert here("e.register_mem(hixl.MemDesc(m.addr, 4096), hixl.MEM_HOST)") == (503900, 0)


WRITE = "e.transfer_async(remote, hixl.WRITE, descs((m.addr, far, SIZE)))"
READ = "e.transfer_sync(remote, hixl.READ, descs((m.addr, far, SIZE)))"


def test_lazy_moves_at_the_second_question(lazy_pair):
    here, there, addr = linked(lazy_pair)
    assert here(f"s, r = {WRITE}; s", far=addr, SIZE=SIZE) == 0
    assert there("m.data") == pattern(1, SIZE)
    assert here("e.get_transfer_status(r)") == (0, "WAITING")
    assert there("m.data") == pattern(1, SIZE)
    assert here("e.get_transfer_status(r)") == (0, "COMPLETED")
    assert there("m.data") == pattern(100, SIZE)
    assert here("e.get_transfer_status(r)") == (103900, "FAILED"), "freed"


def test_source_used_again_too_early_shows(lazy_pair):
    here, there, addr = linked(lazy_pair)
    assert here(f"s, r = {WRITE}; m.fill(3); end_of(e, r)", far=addr, SIZE=SIZE)[1] == "COMPLETED"
    assert there("m.data") == bytes([3]) * SIZE


def test_random_shows_half_a_transfer():
    """Some seeds must catch the bytes between nothing and all, and the end is always right."""
    with peers("random") as both:
        here, there, addr = linked(both)
        partial = 0
        for value in range(10, 20):
            here(f"m.fill(value); s, r = {WRITE}", far=addr, SIZE=SIZE, value=value)
            seen = set(there("m.data"))
            partial += value in seen and len(seen) > 1
            assert here("end_of(e, r)") == (0, "COMPLETED")
            assert set(there("m.data")) == {value}
        assert partial


def test_what_nobody_asks_for_moves_too(lazy_pair):
    here, there, addr = linked(lazy_pair)
    here(f"s, r = {WRITE}", far=addr, SIZE=SIZE)
    assert there("eventually(lambda: m.data == data)", data=pattern(100, SIZE))


def test_disconnect_stops_the_writes(lazy_pair):
    here, there, addr = linked(lazy_pair)
    here(f"s, r = {WRITE}", far=addr, SIZE=SIZE)
    assert here("e.disconnect(remote)") == 0
    assert here("e.get_transfer_status(r)") == (103900, "FAILED"), "the request is gone"
    # Longer than the patience after which what nobody asks for moves.
    assert here("__import__('time').sleep(1.2)") is None
    assert there("m.data") == pattern(1, SIZE)


@pytest.mark.parametrize("near", KINDS)
def test_unregistered_local_memory(lazy_pair, near):
    here, _, addr = linked(lazy_pair, near=near, register=False)
    names = {"far": addr, "SIZE": SIZE}
    assert here(WRITE, **names) == (103900, 0), "asynchronous transfers are direct"
    if near == "Host":
        assert here(READ, **names) == 0
        assert here("m.data") == pattern(1, SIZE)
    else:
        assert here(READ, **names) == 503900, "taken for host memory, which it isn't"
        assert here("m.data") == pattern(100, SIZE)


def test_wild_local_addresses_fail_and_harm_nobody(lazy_pair):
    here, there, addr = linked(lazy_pair)
    for operation in ("READ", "WRITE"):
        code = f"e.transfer_sync(remote, hixl.{operation}, descs((4096, far, 64)))"
        assert here(code, far=addr) == 503900
    assert there("m.data") == pattern(1, SIZE)


def test_without_a_pool_nothing_is_staged(lazy_pair):
    options = {"BufferPool": "0:0"}
    here, _, addr = linked(lazy_pair, near_options=options, register=False)
    assert here(READ, far=addr, SIZE=SIZE) == 103900


def test_remote_ranges_must_be_registered(lazy_pair):
    here, _, addr = linked(lazy_pair)
    assert here(READ, far=addr + 1, SIZE=SIZE) == 103900, "staged"
    assert here(WRITE, far=addr + 1, SIZE=SIZE) == (103900, 0), "direct"


@pytest.mark.parametrize("side", ["here", "there"])
def test_what_is_registered_after_connect_is_not_reached(lazy_pair, side):
    here, there, addr = linked(lazy_pair)
    peer = here if side == "here" else there
    late = peer("late = Host(bytes(64)); register(e, late); late.addr")
    local, remote = (late, addr) if side == "here" else (here("m.addr"), late)
    names = {"local": local, "far": remote}
    for call in ("e.transfer_sync", "e.transfer_async"):
        answer = here(f"{call}(remote, hixl.READ, descs((local, far, 64)))", **names)
        assert answer in (103900, (103900, 0))
    assert here("e.disconnect(remote), e.connect(remote)") == (0, 0)
    assert here("e.transfer_sync(remote, hixl.READ, descs((local, far, 64)))") == 0


@pytest.mark.parametrize("side", ["here", "there"])
def test_nothing_is_deregistered_while_somebody_is_connected(lazy_pair, side):
    """Neither by the side that has connected, nor by the other; and it stays as it was."""
    here, there, addr = linked(lazy_pair)
    here(f"s, r = {WRITE}", far=addr, SIZE=SIZE)
    peer = here if side == "here" else there
    assert peer("e.deregister_mem(handle)") == 503900
    assert here("end_of(e, r)") == (0, "COMPLETED")
    assert there("m.data") == pattern(100, SIZE)
    assert peer("e.register_mem(hixl.MemDesc(m.addr, 64), hixl.MEM_HOST)") == (103900, 0)
    assert here("e.disconnect(remote)") == 0
    assert peer("eventually(lambda: e.deregister_mem(handle) == 0)")


def test_memory_freed_while_registered_is_no_crash(lazy_pair):
    here, there, addr = linked(lazy_pair, far="Device")
    there("m.free()")
    # The peer's bytes are poison by now; that nobody is told is what real memory would do, too.
    assert here(READ, far=addr, SIZE=SIZE) in (0, 503900)
    assert here("m.data") != pattern(1, SIZE)
    assert there("1 + 1") == 2


@pytest.mark.parametrize("pieces", ["", "(0, far, 8)", "(m.addr, 0, 8)", "(m.addr, far, 0)"])
def test_bad_pieces(lazy_pair, pieces):
    here, _, addr = linked(lazy_pair)
    assert here(f"e.transfer_sync(remote, hixl.READ, descs({pieces}))", far=addr) == 103900
    assert here(f"e.transfer_async(remote, hixl.READ, descs({pieces}))") == (103900, 0)
    assert here("e.transfer_sync(remote, hixl.READ, descs((m.addr, far, 2**64 - 1)))") == 103900


def test_fabric_memory_takes_one_kind_per_transfer(lazy_pair):
    here, _, addr = linked(lazy_pair, near_options={"EnableUseFabricMem": "1"})
    here("d = Device(bytes(SIZE)); register(e, d)", SIZE=SIZE)
    assert here("e.disconnect(remote), e.connect(remote)") == (0, 0)
    pieces = "descs((m.addr, far, 8), (d.addr, far, 8))"
    assert here(f"e.transfer_sync(remote, hixl.READ, {pieces})", far=addr) == 103900
    assert here(f"[e.transfer_sync(remote, hixl.READ, [p]) for p in {pieces}]") == [0, 0]


def test_all_requests_at_once(lazy_pair):
    options = {"LocalCommRes": '{"version": "1.3"}'}
    here, _, addr = linked(lazy_pair, near_options=options)
    code = """
    requests = []
    for number in (11, 12, 13):
        args = hixl.TransferArgs()
        args.user_data = number
        piece = descs((m.addr, far, 64))
        requests.append(e.transfer_async(remote, hixl.READ, piece, args=args)[1])
    def query(**limits):
        status, results = e.get_all_transfer_status(hixl.GetTransferStatusArgs(**limits))
        return status, [(requests.index(r.req), r.user_data, r.status) for r in results]
    query(skip_waiting=True)
    """
    assert here(code, far=addr) == (0, [])
    assert here("query(max_query_count=1)") == (0, [(0, 11, "COMPLETED")])
    assert here("query()") == (0, [(1, 12, "COMPLETED"), (2, 13, "COMPLETED")])
    assert here("query()") == (0, [])


def test_all_requests_needs_new_resources(lazy_pair):
    here, _ = lazy_pair
    here("e = engine('127.0.0.1', LocalCommRes='')")
    assert here("e.get_all_transfer_status(hixl.GetTransferStatusArgs())") == (103905, [])


def test_too_many_requests_is_worth_a_retry(lazy_pair):
    here, _, addr = linked(lazy_pair)
    code = """
    one = descs((m.addr, far, 8))
    begun = [e.transfer_async(remote, hixl.READ, one) for _ in range(128)]
    [status for status, _ in begun], e.transfer_async(remote, hixl.READ, one)
    """
    assert here(code, far=addr) == ([0] * 128, (203900, 0))
    assert here("end_of(e, begun[0][1]), e.transfer_async(remote, hixl.READ, one)[0]") == (
        (0, "COMPLETED"),
        0,
    )


def test_threads_share_a_link(lazy_pair):
    here, _, addr = linked(lazy_pair)
    code = """
    from concurrent.futures import ThreadPoolExecutor
    def part(i):
        runtime.aclrtSetDevice(0)
        size = SIZE // 16
        piece = descs((m.addr + i * size, far + i * size, size))
        if i % 2:
            return e.transfer_sync(remote, hixl.READ, piece, 30000)
        status, request = e.transfer_async(remote, hixl.READ, piece)
        return status or (end_of(e, request)[1] is not hixl.TransferStatus.COMPLETED)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(part, range(16)))
    results
    """
    assert here(code, far=addr, SIZE=SIZE) == [0] * 16
    assert here("m.data") == pattern(1, SIZE)

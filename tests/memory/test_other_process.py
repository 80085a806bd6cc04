# SPDX-License-Identifier: Apache-2.0
"""Another process's memory: mapped through its descriptor, and copied by the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer import Peer, map_pages, peek, poke, spawned_peer, unmap

from llm_datadist_torch import _C

PAGE = mmap.PAGESIZE
SPACE = 1 << 20
"""Bytes on either side of the property test."""

Run = tuple[int, int, int]


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with spawned_peer() as started:
        yield started


def noise(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def addresses(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def as_runs(runs: list[Run]) -> torch.Tensor:
    return torch.tensor(runs, dtype=torch.int64).view(-1, 3)


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- PeerMapping


@pytest.mark.parametrize("nbytes", [1, 5000, 5 << 20])
def test_a_mapping_is_the_peers_memory(peer: Peer, nbytes: int) -> None:
    address, fd, inode, device = peer.call("make_region", nbytes)
    data = noise(nbytes, nbytes)
    peer.call("poke", address, data)
    mapping = _C.PeerMapping.open(peer.pid, fd, inode, device, nbytes)
    assert mapping.address % (2 << 20) == 0
    assert mapping.nbytes == nbytes
    assert peek(mapping.address, nbytes) == data
    poke(mapping.address, data[::-1])
    assert peer.call("peek", address, nbytes) == data[::-1]
    mapping.close()
    peer.call("free_region", address)


def test_the_mapping_outlives_the_region(peer: Peer) -> None:
    address, fd, inode, device = peer.call("make_region", PAGE)
    peer.call("poke", address, b"kept")
    mapping = _C.PeerMapping.open(peer.pid, fd, inode, device, PAGE)
    peer.call("free_region", address)
    assert peek(mapping.address, 4) == b"kept"


def test_a_mapping_leaves_nothing_behind(peer: Peer) -> None:
    address, fd, inode, device = peer.call("make_region", 3 * PAGE)
    _C.PeerMapping.open(peer.pid, fd, inode, device, 3 * PAGE).close()
    before = mappings(), open_descriptors()
    for index in range(1000):
        mapping = _C.PeerMapping.open(peer.pid, fd, inode, device, 3 * PAGE)
        if index % 2:
            mapping.close()
            mapping.close()
            assert mapping.address == 0
        del mapping
    assert (mappings(), open_descriptors()) == before
    peer.call("free_region", address)


def test_another_file_under_that_number_is_refused(peer: Peer) -> None:
    address, fd, inode, device = peer.call("make_region", PAGE)
    before = mappings(), open_descriptors()
    for wrong in (
        (fd, inode + 1, device, PAGE),
        (fd, inode, device + 1, PAGE),
        (fd, inode, device, PAGE + 1),  # larger than the file
    ):
        with pytest.raises(OSError, match="not the region it was announced as") as caught:
            _C.PeerMapping.open(peer.pid, *wrong)
        assert caught.value.errno == errno.ESTALE
    assert (mappings(), open_descriptors()) == before
    peer.call("free_region", address)


def test_memory_that_can_shrink_is_not_mapped() -> None:
    """Its owner could end us with SIGBUS."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        status = os.fstat(fd)
        where = os.getpid(), fd, status.st_ino, status.st_dev, PAGE
        before = mappings(), open_descriptors()
        with pytest.raises(PermissionError, match="not sealed against shrinking"):
            _C.PeerMapping.open(*where)
        assert (mappings(), open_descriptors()) == before
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        _C.PeerMapping.open(*where).close()
    finally:
        os.close(fd)


def test_a_descriptor_that_is_closed_or_none(peer: Peer) -> None:
    address, fd, inode, device = peer.call("make_region", PAGE)
    peer.call("free_region", address)
    for number in (fd, -1, 100_000):
        with pytest.raises(OSError, match=str(number)) as caught:
            _C.PeerMapping.open(peer.pid, number, inode, device, PAGE)
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("nbytes", [0, 1 << 60])
def test_sizes_that_no_region_has(peer: Peer, nbytes: int) -> None:
    address, fd, inode, device = peer.call("make_region", PAGE)
    with pytest.raises(OSError, match=r"mapping|announced"):
        _C.PeerMapping.open(peer.pid, fd, inode, device, nbytes)
    peer.call("free_region", address)


def test_a_dead_process_has_no_regions_and_no_memory() -> None:
    with spawned_peer() as doomed:
        address, fd, inode, device = doomed.call("make_region", PAGE)
        doomed.call("poke", address, b"left")
        mapping = _C.PeerMapping.open(doomed.pid, fd, inode, device, PAGE)
        doomed.kill()
        with pytest.raises(ProcessLookupError):
            _C.PeerMapping.open(doomed.pid, fd, inode, device, PAGE)
        assert peek(mapping.address, 4) == b"left"  # what is mapped stays
        target = torch.zeros(4, dtype=torch.uint8)
        bases = addresses(target.data_ptr()), addresses(address)
        for call in (_C.read_process, _C.write_process):
            assert call(doomed.pid, *bases, as_runs([(0, 0, 4)])) == (0, errno.ESRCH)


# -- read_process, write_process


@pytest.fixture(scope="module")
def far(peer: Peer) -> int:
    """Address of SPACE bytes of the peer."""
    return peer.call("map_pages", SPACE)


def model_copy(dst: bytearray, src: bytes, runs: list[Run], bases: list[tuple[int, int]]) -> None:
    for dst_base, src_base in bases:
        for dst_at, src_at, nbytes in runs:
            start = dst_base + dst_at
            dst[start : start + nbytes] = src[src_base + src_at : src_base + src_at + nbytes]


# Destinations don't overlap: slot i of 32 KiB belongs to run i, 256 KiB to each of the tensors.
run_lists = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 200_000), st.integers(0, 27_000)), max_size=8
).map(lambda found: [(i * 32_768 + dst, src, size) for i, (dst, src, size) in enumerate(found)])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(runs=run_lists, tensors=st.integers(1, 4), write=st.booleans(), seed=st.integers(0, 99))
def test_bytes_arrive_where_they_belong_and_nowhere_else(
    peer: Peer, far: int, runs: list[Run], tensors: int, write: bool, seed: int
) -> None:
    here, there = noise(SPACE, seed), noise(SPACE, seed + 1000)
    local = torch.frombuffer(bytearray(here), dtype=torch.uint8)
    peer.call("poke", far, there)
    bases = [(t << 18, (t << 18) // 2) for t in range(tensors)]  # (destination, source)
    total = tensors * sum(size for _, _, size in runs)
    if write:
        expected = bytearray(there)
        model_copy(expected, here, runs, bases)
        sides = [src for _, src in bases], [dst for dst, _ in bases]
        moves, call = [(src, dst, n) for dst, src, n in runs], _C.write_process
    else:
        expected = bytearray(here)
        model_copy(expected, there, runs, bases)
        sides = [dst for dst, _ in bases], [src for _, src in bases]
        moves, call = runs, _C.read_process
    local_bases = addresses(*(local.data_ptr() + at for at in sides[0]))
    remote_bases = addresses(*(far + at for at in sides[1]))
    assert call(peer.pid, local_bases, remote_bases, as_runs(moves)) == (total, 0)
    assert peer.call("peek", far, SPACE) == (bytes(expected) if write else there)
    assert bytes(local.numpy()) == (here if write else bytes(expected))


def test_more_pieces_than_one_call_takes(peer: Peer, far: int) -> None:
    data = noise(SPACE, 3)
    peer.call("poke", far, data)
    local = torch.zeros(SPACE, dtype=torch.uint8)
    starts = random.Random(1).sample(range(0, SPACE - 64, 64), 5000)
    runs = as_runs([(at, at, 40) for at in starts])
    done = _C.read_process(peer.pid, addresses(local.data_ptr()), addresses(far), runs)
    assert done == (5000 * 40, 0)
    expected = bytearray(SPACE)
    model_copy(expected, data, [(at, at, 40) for at in starts], [(0, 0)])
    assert bytes(local.numpy()) == bytes(expected)


@pytest.mark.parametrize("write", [False, True])
def test_totals_that_are_split_over_threads(peer: Peer, write: bool) -> None:
    nbytes = 40 << 20
    address = peer.call("map_pages", nbytes)
    local = torch.zeros(nbytes + 2, dtype=torch.uint8)
    body = local[1:-1]
    data = noise(nbytes, 9)
    rows = 40
    order = random.Random(2).sample(range(rows), rows)
    runs = as_runs([(i << 20, j << 20, 1 << 20) for i, j in enumerate(order)])
    if write:
        body.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        call = _C.write_process
    else:
        peer.call("poke", address, data)
        call = _C.read_process
    bases = addresses(body.data_ptr()), addresses(address)
    assert call(peer.pid, *bases, runs) == (nbytes, 0)
    if write:
        got = peer.call("peek", address, nbytes)
        assert all(
            got[j << 20 : (j + 1) << 20] == data[i << 20 : (i + 1) << 20]
            for i, j in enumerate(order)
        )
    else:
        got = bytes(body.numpy())
        assert all(
            got[i << 20 : (i + 1) << 20] == data[j << 20 : (j + 1) << 20]
            for i, j in enumerate(order)
        )
        assert int(local[0]) == int(local[-1]) == 0
    peer.call("unmap", address, nbytes)


@pytest.mark.parametrize("write", [False, True])
def test_a_hole_stops_it_and_the_count_says_where(peer: Peer, write: bool) -> None:
    """The third page of the peer is not there; runs of 1000 bytes are moved in order."""
    address = peer.call("map_pages", 4 * PAGE)
    peer.call("unmap", address + 2 * PAGE, PAGE)
    data = noise(2 * PAGE, 4)
    peer.call("poke", address, data)
    local = torch.frombuffer(bytearray(noise(4 * PAGE, 5)), dtype=torch.uint8)
    before = bytes(local.numpy())
    runs = as_runs([(at, at, 1000) for at in range(0, 16_000, 1000)])
    call = _C.write_process if write else _C.read_process
    done, number = call(peer.pid, addresses(local.data_ptr()), addresses(address), runs)
    assert number == errno.EFAULT
    assert 8000 <= done <= 2 * PAGE
    afterwards = bytes(local.numpy())
    if write:
        assert afterwards == before
        assert peer.call("peek", address, done) == before[:done]
        assert peer.call("peek", address + done, 2 * PAGE - done) == data[done:]
    else:
        assert afterwards[:done] == data[:done]
        assert afterwards[2 * PAGE :] == before[2 * PAGE :]


def test_a_wild_local_address_is_an_errno_and_no_crash(peer: Peer, far: int) -> None:
    runs = as_runs([(0, 0, 100)])
    for call in (_C.read_process, _C.write_process):
        assert call(peer.pid, addresses(16), addresses(far), runs) == (0, errno.EFAULT)
        assert call(peer.pid, addresses(-4096), addresses(far), runs)[1] == errno.EFAULT


def test_no_process_of_that_id() -> None:
    target = torch.zeros(4, dtype=torch.uint8)
    bases = addresses(target.data_ptr()), addresses(4096)
    free_pid = int(Path("/proc/sys/kernel/pid_max").read_text())
    assert _C.read_process(free_pid, *bases, as_runs([(0, 0, 4)])) == (0, errno.ESRCH)


def test_this_process_counts_as_another_one() -> None:
    src, dst = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    bases = addresses(dst.data_ptr()), addresses(src.data_ptr())
    assert _C.read_process(os.getpid(), *bases, as_runs([(50, 0, 50)])) == (50, 0)
    assert torch.equal(dst[50:], src[:50])
    assert int(dst[:50].sum()) == 0


def test_nothing_to_do(peer: Peer) -> None:
    none = as_runs([])
    assert _C.read_process(peer.pid, addresses(1), addresses(1), none) == (0, 0)
    empty = as_runs([(5, 5, 0)] * 3)
    assert _C.read_process(peer.pid, addresses(1), addresses(1), empty) == (0, 0)
    assert _C.read_process(peer.pid, addresses(), addresses(), as_runs([(0, 0, 9)])) == (0, 0)


def test_a_deadline_in_the_past_moves_nothing(peer: Peer, far: int) -> None:
    local = torch.zeros(SPACE, dtype=torch.uint8)
    peer.call("poke", far, b"\1" * SPACE)
    bases = addresses(local.data_ptr()), addresses(far)
    assert _C.read_process(peer.pid, *bases, as_runs([(0, 0, SPACE)]), 1) == (0, 0)
    assert int(local.sum()) == 0
    later = time.monotonic_ns() + 60_000_000_000
    assert _C.read_process(peer.pid, *bases, as_runs([(0, 0, SPACE)]), later) == (SPACE, 0)


def test_a_deadline_in_the_middle_ends_it_early(peer: Peer) -> None:
    """2 GiB within 5 ms: no machine does that."""
    nbytes = 32 << 20
    address = peer.call("map_pages", nbytes)
    local = torch.zeros(nbytes, dtype=torch.uint8)
    bases = addresses(local.data_ptr()), addresses(address)
    runs = as_runs([(0, 0, nbytes)] * 64)
    done, number = _C.read_process(peer.pid, *bases, runs, time.monotonic_ns() + 5_000_000)
    assert number == 0
    assert done < 64 * nbytes
    peer.call("unmap", address, nbytes)


def test_other_threads_run_meanwhile(peer: Peer) -> None:
    nbytes = 64 << 20
    address = peer.call("map_pages", nbytes)
    local = torch.zeros(nbytes, dtype=torch.uint8)
    bases = addresses(local.data_ptr()), addresses(address)
    finished = threading.Event()

    def move() -> None:  # 64 GiB: it is the deadline that ends it
        deadline = time.monotonic_ns() + 300_000_000
        _C.read_process(peer.pid, *bases, as_runs([(0, 0, nbytes)] * 1024), deadline)
        finished.set()

    thread = threading.Thread(target=move)
    thread.start()
    turns = 0
    while not finished.wait(0.001):
        turns += 1
    thread.join(60)
    assert turns > 3  # with the GIL held there would be one
    peer.call("unmap", address, nbytes)


@pytest.mark.parametrize(
    ("local", "remote", "runs", "match"),
    [
        (addresses(1), addresses(1, 2), as_runs([]), "local_bases has 1 entries, remote_bases 2"),
        (addresses(1), addresses(1), torch.zeros(2, 2, dtype=torch.int64), "3 columns"),
        (addresses(1), addresses(1), torch.zeros(3, dtype=torch.int64), "runs must be a 2-D int64"),
        (addresses(1), addresses(1), as_runs([(0, 0, 1), (0, -1, 1)]), r"runs\[1\]=\(0, -1, 1\)"),
        (addresses(1), addresses(1), as_runs([(0, 0, -1)]), r"runs\[0\]"),
        (torch.zeros(1), addresses(1), as_runs([]), "local_bases must be a 1-D int64"),
    ],
)
def test_arguments_that_make_no_sense(
    peer: Peer, local: torch.Tensor, remote: torch.Tensor, runs: torch.Tensor, match: str
) -> None:
    for call in (_C.read_process, _C.write_process):
        with pytest.raises((TypeError, ValueError), match=match):
            call(peer.pid, local, remote, runs)


@pytest.mark.parametrize("pid", [0, -1, 2**31])
def test_numbers_that_are_no_process_ids(pid: int) -> None:
    with pytest.raises(ValueError, match="pid"):
        _C.read_process(pid, addresses(1), addresses(1), as_runs([]))


def test_the_peers_traceback_comes_home(peer: Peer) -> None:
    with pytest.raises(AssertionError, match=r"RuntimeError: what went wrong"):
        peer.call("fail", "what went wrong")


def test_own_pages_can_be_unmapped() -> None:
    address = map_pages(PAGE)
    poke(address, b"x")
    assert peek(address, 1) == b"x"
    unmap(address, PAGE)


# -- whose memory it is


def start_ticks(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


@pytest.mark.parametrize("write", [False, True])
def test_another_process_with_the_pid_is_left_alone(peer: Peer, write: bool) -> None:
    """The pid is the peer's, but the process that was meant started at another time."""
    local = torch.full((PAGE,), 7, dtype=torch.uint8)
    far = peer.call("map_pages", PAGE)
    peer.call("poke", far, noise(PAGE, 1))
    runs, bases = as_runs([(0, 0, PAGE)]), (addresses(local.data_ptr()), addresses(far))
    call = _C.write_process if write else _C.read_process
    started = start_ticks(peer.pid)
    assert call(peer.pid, *bases, runs, 0, -1, started + 1) == (0, errno.ESRCH)
    assert peer.call("peek", far, PAGE) == noise(PAGE, 1)
    assert local.unique().tolist() == [7]
    assert call(peer.pid, *bases, runs, 0, -1, started) == (PAGE, 0)
    peer.call("unmap", far, PAGE)


def test_the_pidfd_of_a_process_that_has_ended(peer: Peer) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    pidfd = os.pidfd_open(child)
    os.waitpid(child, 0)
    try:
        # As if the peer had the pid now.
        local = torch.zeros(PAGE, dtype=torch.uint8)
        bases = addresses(local.data_ptr()), addresses(local.data_ptr())
        runs = as_runs([(0, 0, 8)])
        assert _C.write_process(peer.pid, *bases, runs, 0, pidfd) == (0, errno.ESRCH)
    finally:
        os.close(pidfd)


def test_many_pieces_of_many_runs(peer: Peer) -> None:
    """Pieces of 4 MiB begin anywhere in a list of runs, some of them empty, in several tensors."""
    block, count = 1000, 9000
    nbytes = block * count
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)
    runs = torch.stack(
        [torch.arange(count) * block, order * block, torch.full((count,), block)], dim=1
    )
    empty = torch.zeros((count, 3), dtype=torch.int64)
    runs = torch.stack([runs, empty], dim=1).view(-1, 3).contiguous()
    far = peer.call("map_pages", -(-2 * nbytes // PAGE) * PAGE)
    data = noise(2 * nbytes, 5)
    peer.call("poke", far, data)
    local = torch.zeros(2 * nbytes, dtype=torch.uint8)
    here = local.data_ptr()
    done = _C.read_process(
        peer.pid, addresses(here, here + nbytes), addresses(far, far + nbytes), runs
    )
    assert done == (2 * nbytes, 0)
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(2, count, block)
    assert torch.equal(local.view(2, count, block), source[:, order])
    peer.call("unmap", far, -(-2 * nbytes // PAGE) * PAGE)

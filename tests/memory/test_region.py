# SPDX-License-Identifier: Apache-2.0
"""Host regions: where they lie, who keeps them alive, and what refuses to become one."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import allocate
from llm_datadist_torch.memory.allocate import (
    TENSOR_ALIGNMENT,
    HostMemory,
    allocate_bytes,
    allocate_tensors,
)
from llm_datadist_torch.memory.pinned import PinnedMemory, allocate_pinned_bytes
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.values.status import (
    LLMFeatureNotEnabledError,
    LLMOutOfMemoryError,
    LLMParamError,
)

TWO_MIB = 2 << 20


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, old)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, TWO_MIB - 1, TWO_MIB, 5 * TWO_MIB + 3])
@pytest.mark.parametrize("shareable", [True, False])
def test_starts_on_a_2_mib_boundary_and_is_zeroed(nbytes: int, shareable: bool) -> None:
    region = _C.HostRegion.create(nbytes, shareable)
    assert region.address % TWO_MIB == 0
    assert region.nbytes == nbytes
    (tensor,) = region.tensors([0], [nbytes], torch.uint8)
    assert tensor.data_ptr() == region.address
    assert int(tensor.sum()) == 0
    tensor.fill_(1)
    assert int(tensor.sum()) == nbytes
    assert (region.fd >= 0) == shareable
    assert (region.reason == "") == shareable


def test_the_descriptor_is_the_memory() -> None:
    region = _C.HostRegion.create(10_000)
    status = os.fstat(region.fd)
    assert (status.st_ino, status.st_dev) == (region.inode, region.device)
    assert not os.get_inheritable(region.fd)
    (tensor,) = region.tensors([4096], [3], torch.uint8)
    tensor.copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert os.pread(region.fd, 5, 4095) == b"\0\1\2\3\0"


def test_nobody_can_shrink_it() -> None:
    region = _C.HostRegion.create(10_000)
    assert fcntl.fcntl(region.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0)


def test_two_regions_are_two_files() -> None:
    one, other = (_C.HostRegion.create(4096) for _ in range(2))
    assert (one.inode, one.device) != (other.inode, other.device)
    assert one.fd != other.fd


def test_the_storage_of_each_tensor_is_its_own_bytes_and_keeps_the_region() -> None:
    descriptors = open_descriptors()
    region = _C.HostRegion.create(4096)
    first, second = region.tensors([0, 64], [4, 4], torch.float32)
    for tensor in (first, second):
        assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()
        assert tensor.untyped_storage().nbytes() == 64
    assert first.data_ptr() == region.address
    second.fill_(3)
    del region, first, tensor
    assert float(second.sum()) == 48
    assert open_descriptors() == descriptors + 1
    del second
    assert open_descriptors() == descriptors


def test_writing_one_tensor_is_no_write_to_its_neighbour() -> None:
    """They share a region, and yet autograd must not think that they alias."""
    (one, other), _ = allocate_tensors((4,), torch.float32, 2)
    version = other._version
    one.add_(1)
    assert other._version == version


@pytest.mark.parametrize(
    ("offsets", "shape", "match"),
    [
        ([0, 4093], [4], r"offsets\[1\]=4093 .* beyond the 4096 bytes"),
        ([-4], [4], r"offsets\[0\]=-4"),
        ([2**62], [4], r"beyond"),
        ([0], [4097], r"beyond"),
        ([0], [0], r"positive"),
        ([0], [2**40, 2**40], r"int64"),
    ],
)
def test_tensors_outside_the_region_are_refused(
    offsets: list[int], shape: list[int], match: str
) -> None:
    region = _C.HostRegion.create(4096)
    with pytest.raises(ValueError, match=match):
        region.tensors(offsets, shape, torch.uint8)


def test_misaligned_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the 4 bytes"):
        _C.HostRegion.create(4096).tensors([2], [1], torch.float32)


@pytest.mark.parametrize("nbytes", [1 << 60, 2**63 - 1])
def test_what_the_kernel_cannot_map_is_enomem(nbytes: int) -> None:
    descriptors = open_descriptors()
    with pytest.raises(OSError, match="mapping") as caught:
        _C.HostRegion.create(nbytes)
    assert caught.value.errno == 12
    assert open_descriptors() == descriptors


def test_without_a_descriptor_the_memory_is_private_and_says_why() -> None:
    probe = os.dup(0)
    os.close(probe)  # the lowest free descriptor
    with limited(resource.RLIMIT_NOFILE, probe):
        region = _C.HostRegion.create(4096)
    assert region.fd == -1
    assert "memfd_create: Too many open files" in region.reason
    (tensor,) = region.tensors([0], [4096], torch.uint8)
    tensor.fill_(1)


def test_a_thousand_rounds_leave_nothing_behind() -> None:
    gc.collect()
    for _ in range(10):
        allocate_tensors((100, 100), torch.float32, 4)
    before = open_descriptors(), mappings()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    for _ in range(1000):
        tensors, region = allocate_tensors((100, 100), torch.float32, 4)
        tensors[3].fill_(1)
        del tensors, region
    assert (open_descriptors(), mappings()) == before
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - resident
    assert grown < 1024  # pages; a leak of one page per round would show


# -- allocate_tensors and the sources of memory


def test_one_region_with_tensors_at_64_kib_steps() -> None:
    tensors, region = allocate_tensors((3, 11_000), torch.float16, 5)
    assert region.address % TWO_MIB == 0
    offsets = [t.data_ptr() - region.address for t in tensors]
    assert offsets == [i * 2 * TENSOR_ALIGNMENT for i in range(5)]
    assert region.nbytes == offsets[-1] + 66_000
    assert region.shareable
    for tensor in tensors:
        assert tensor.shape == (3, 11_000)
        assert tensor.dtype is torch.float16
        assert not tensor.is_inference()


def test_allocating_touches_no_memory() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    kept = allocate_tensors((1 << 20, 128), torch.float16, 4)  # 1 GiB
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - resident
    assert grown * os.sysconf("SC_PAGE_SIZE") < 64 << 20
    del kept


def test_the_region_alone_keeps_the_memory() -> None:
    tensors, region = allocate_tensors((4,), torch.float32, 1)
    tensors[0].fill_(5)
    del tensors
    assert os.pread(region.fd, 4, 0) == torch.tensor([5.0]).numpy().tobytes()


def test_regions_have_ids_of_their_own_and_are_frozen() -> None:
    one, other = (allocate_bytes(4096)[1] for _ in range(2))
    assert one.region_id != other.region_id
    assert one != other
    with pytest.raises(FrozenInstanceError):
        one.nbytes = 1  # type: ignore[misc]


@pytest.mark.parametrize("memory", [HostMemory(), PinnedMemory()])
def test_more_than_the_machine_has_is_refused_with_both_figures(memory: HostMemory) -> None:
    if isinstance(memory, PinnedMemory):
        asked = 3 << 50
        with pytest.raises(LLMOutOfMemoryError, match=str(asked)):
            memory.allocate(1, (3 << 50,), torch.uint8)
        return
    with pytest.raises(LLMOutOfMemoryError, match=r"available now: [0-9]+ bytes") as caught:
        memory.allocate(3, (1 << 49,), torch.float16)
    assert caught.value.requested_bytes == 3 << 50
    assert caught.value.free_bytes
    assert str(3 << 50) in str(caught.value)


@pytest.mark.parametrize("count", [2**40, 2**70])
def test_an_absurd_count_is_refused_at_once(count: int) -> None:
    with pytest.raises(LLMOutOfMemoryError):
        HostMemory().allocate(count, (1,), torch.uint8)


def test_a_refusal_of_the_kernel_is_out_of_memory() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limited(resource.RLIMIT_AS, in_use + (256 << 20)):
        with pytest.raises(LLMOutOfMemoryError, match="kernel refused") as caught:
            HostMemory().allocate(1, (512 << 20,), torch.uint8)
        HostMemory().allocate(1, (1 << 20,), torch.uint8)
    assert caught.value.requested_bytes == 512 << 20


@pytest.mark.parametrize(("count", "shape"), [(0, (4,)), (-1, (4,)), (1, (0, 4)), (1, (-4,))])
def test_nonsense_is_refused(count: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(LLMParamError, match=r"positive|at least 1"):
        HostMemory().allocate(count, shape, torch.uint8)


def test_pinned_memory_needs_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(LLMFeatureNotEnabledError, match="accelerator"):
        PinnedMemory().allocate(1, (4,), torch.uint8)


class _FakePinning:
    """torch.empty as it is where there is an accelerator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: object) -> None:
        self.asked: list[int] = []
        self._result = result
        self._empty = torch.empty
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch, "empty", self)

    def __call__(
        self, nbytes: int, *, dtype: torch.dtype, device: object, pin_memory: bool = False
    ) -> torch.Tensor:
        assert device in ("cpu", torch.device("cpu"))
        if not pin_memory:
            return self._empty(nbytes, dtype=dtype)
        self.asked.append(nbytes)
        if isinstance(self._result, Exception):
            raise self._result
        return self._empty(nbytes if self._result is None else self._result, dtype=dtype)


def test_pinned_tensors_share_one_pinned_span(monkeypatch: pytest.MonkeyPatch) -> None:
    pinning = _FakePinning(monkeypatch, None)
    allocation = PinnedMemory().allocate(3, (4, 5), torch.float16)
    assert pinning.asked == [2 * TENSOR_ALIGNMENT + 40]
    region = allocation.region
    assert [t.data_ptr() - region.address for t in allocation.tensors] == [0, 65536, 131072]
    assert [t.shape for t in allocation.tensors] == [(4, 5)] * 3
    assert not region.shareable
    assert region.reason


@pytest.mark.parametrize("result", [RuntimeError("no pinned pages"), 0])
def test_a_failed_pin_is_out_of_memory(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    _FakePinning(monkeypatch, result)
    with pytest.raises(LLMOutOfMemoryError, match="pinning 40 bytes failed"):
        PinnedMemory().allocate(1, (4, 5), torch.float16)
    with pytest.raises(LLMOutOfMemoryError, match="pinning 99 bytes failed"):
        allocate_pinned_bytes(99)


def test_a_driver_that_refuses_to_pin_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _FakePinning(monkeypatch, RuntimeError("error code 207001"))
    with pytest.raises(LLMOutOfMemoryError, match="refused to pin it") as caught:
        allocate_pinned_bytes(99)
    assert "207001" in str(caught.value)
    assert "RLIMIT_MEMLOCK" in caught.value.remedy
    assert "fewer or smaller" not in caught.value.remedy


def test_a_kernel_without_meminfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocate, "_MEMINFO", tmp_path / "absent")
    with pytest.raises(LLMOutOfMemoryError, match="available now: unknown"):
        HostMemory().allocate(1, (1 << 60,), torch.uint8)


def test_region_of_foreign_memory() -> None:
    region = Region(4096, 10)
    assert not region.shareable
    assert (region.fd, region.inode, region.device) == (-1, 0, 0)


def test_hundreds_of_regions_leave_descriptors_for_links() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * (opened + 10), hard))
    try:
        regions = [_C.HostRegion.create(10_000) for _ in range(300)]
        assert len(list(Path("/proc/self/fd").iterdir())) < opened + 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(region.fd >= 0 for region in regions)
    shared = [region for region in regions if region.offset]
    assert len({(region.inode, region.offset) for region in regions}) == 300
    assert len(shared) > 200
    for number, region in enumerate(shared):
        (tensor,) = region.tensors([0], [10_000], torch.uint8)
        tensor.fill_(number % 251)
        mapping = _C.PeerMapping.open(
            os.getpid(), region.fd, region.inode, region.device, region.nbytes, region.offset
        )
        assert bytes_at(mapping.address, 10_000).unique().tolist() == [number % 251]
        mapping.close()
    last = shared[-1]
    where = (os.getpid(), last.fd, last.inode, last.device, last.nbytes)
    with pytest.raises(OSError, match="not the region"):
        _C.PeerMapping.open(*where, last.offset + (1 << 40))
    # Where a region has been, no other one comes: a late write of a peer hits nobody.
    offset = last.offset
    del last, region, regions, tensor
    shared.pop()
    assert _C.HostRegion.create(10_000).offset != offset or offset == 0


def test_a_shortage_of_descriptors_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    allocate._warn_of_descriptors.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * (opened + 10), hard))
    try:
        made = [allocate.allocate_tensors((100,), torch.uint8, 1) for _ in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (said,) = [text for text in caplog.messages if "RLIMIT_NOFILE" in text]
    assert f"of the {4 * (opened + 10)} descriptors" in said
    assert len(made) == 40


def bytes_at(address: int, nbytes: int) -> torch.Tensor:
    return _C.tensor_over(address, [nbytes], torch.uint8)

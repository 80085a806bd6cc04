# SPDX-License-Identifier: Apache-2.0
"""Memory for new caches: one region, and tensors in it."""

from __future__ import annotations

import functools
import logging
import math
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory.container import container_limit
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.memory.sharing import send_as_shared_memory
from llm_datadist_torch.values.status import LLMOutOfMemoryError, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

TENSOR_ALIGNMENT = 64 * 1024
"""Tensors of a region start at multiples of this many bytes from its start."""

SMALL_BYTES = 64 << 20
"""Sizes up to this are not compared with what there is."""

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Allocation:
    """Memory of one new cache.

    Attributes:
        tensors: Contiguous tensors; each keeps its memory alive. Their contents are not defined.
        region: The region they all lie in; it may hold other caches too.
        flag: Raised by a storage that drops its memory, so that peers notice; None where
            storages can't.
        owner: Keeps the memory, also where torch has given the tensors other memory.
    """

    tensors: tuple[torch.Tensor, ...]
    region: Region
    flag: _C.MoveFlag | None = None
    owner: object = None


class CacheMemory(ABC):
    """A source of memory for caches: one class per kind of memory and device."""

    @abstractmethod
    def allocate(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Make ``count`` contiguous tensors of ``shape`` in one region.

        The memory lives as long as any of the tensors or the region is referenced.

        Raises:
            LLMOutOfMemoryError: There is no room; nothing has changed.
            LLMParamError: ``count`` or a dimension is not positive.
        """


class HostMemory(CacheMemory):
    """Ordinary host memory that peers on this host can map, one region per allocation.

    Thread safety: stateless.
    """

    def allocate(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """See :meth:`CacheMemory.allocate`. Starts on a 2 MiB boundary, zeroed."""
        flag = _C.MoveFlag()
        tensors, region = allocate_tensors(shape, dtype, count, flag=flag)
        return Allocation(tensors, region, flag, region)


def tensors_in(
    base: torch.Tensor, offsets: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Tensors at byte offsets of ``base``; each keeps the memory of all of them alive.

    They are no views in autograd's sense, so that a write to one doesn't count as one to another.
    """
    size = tuple(shape)
    strides = tuple(math.prod(size[at + 1 :]) for at in range(len(size)))
    start = base.storage_offset()
    with torch.inference_mode(mode=False):
        return tuple(
            torch.empty(0, dtype=dtype, device=base.device).set_(
                base.untyped_storage(), (start + offset) // dtype.itemsize, size, strides
            )
            for offset in offsets
        )


def allocate_tensors(
    shape: Sequence[int],
    dtype: torch.dtype,
    count: int,
    *,
    shareable: bool = True,
    flag: _C.MoveFlag | None = None,
) -> tuple[tuple[torch.Tensor, ...], Region]:
    """Make tensors in one new region of zeroed host memory. Touches no page of it.

    The region starts on a 2 MiB boundary, its tensors follow at 64 KiB-aligned offsets. After a
    ``fork`` the child shares (and can change) the pages of a shareable region.

    Args:
        shape: Shape of each tensor, all dimensions positive.
        dtype: Element type.
        count: Number of tensors, at least 1.
        shareable: Whether peers on this host must be able to map it. Where the kernel refuses,
            the memory is private and ``region.reason`` says why.
        flag: Raised when the storage of a tensor drops its memory.

    Returns:
        The tensors, each of which keeps the region's memory alive, and the region.

    Raises:
        LLMOutOfMemoryError: More than this machine could ever give, or the kernel refused.
        LLMParamError: ``count`` or a dimension is not positive.
    """
    offsets, total = offsets_of(count, tensor_nbytes(shape, dtype), check_obtainable)
    host = _create_host_region(total, shareable=shareable)
    if flag is None:
        return tuple(host.tensors(offsets, list(shape), dtype)), region_of(host)
    return tuple(host.watched_tensors(offsets, list(shape), dtype, flag)), region_of(host)


def allocate_bytes(nbytes: int) -> tuple[torch.Tensor, Region]:
    """Make one uint8 tensor ``[nbytes]`` that is a whole shareable region.

    Raises:
        LLMOutOfMemoryError: More than this machine could ever give, or the kernel refused.
        LLMParamError: ``nbytes`` is not positive.
    """
    (base,), region = allocate_tensors((nbytes,), torch.uint8, 1)
    return base, region


def region_of(host: _C.HostRegion) -> Region:
    """The region that ``host`` is; keeps it alive."""
    region = Region(
        host.address,
        host.nbytes,
        host.fd,
        host.inode,
        host.device,
        host.offset,
        host.reason,
        keepalive=host,
    )
    send_as_shared_memory(region)
    return region


def tensor_nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of one contiguous tensor.

    Raises:
        LLMParamError: A dimension is not positive.
    """
    if any(dim <= 0 for dim in shape):
        raise error_for(
            LLMStatusCode.LLM_PARAM_INVALID,
            f"shape={list(shape)} has a dimension that is not positive",
        )
    return math.prod(shape) * dtype.itemsize


def check_obtainable(nbytes: int) -> None:
    """Refuse what the machine could never give.

    The kernel maps almost any size and kills the process when it touches the pages, so a size
    beyond memory and swap is refused here. A size below may still be too large at the moment.

    Raises:
        LLMOutOfMemoryError: ``nbytes`` is more than memory and swap together, of this machine or
            of the container.
    """
    if nbytes <= SMALL_BYTES:  # nearly always; saves reading /proc for every cache
        return
    memory = _meminfo_bytes()
    machine = memory.get("MemTotal", 0) + memory.get("SwapTotal", 0)
    if machine and nbytes > machine:
        raise out_of_memory(f"asked for {nbytes} bytes, this machine has {machine}", nbytes, memory)
    limit = container_limit(memory.get("SwapTotal", 0))
    if limit is not None and nbytes > limit:
        raise out_of_memory(
            f"asked for {nbytes} bytes, this container (its cgroup) may have {limit}",
            nbytes,
            memory,
        )


def _create_host_region(nbytes: int, *, shareable: bool) -> _C.HostRegion:
    try:
        region = _C.HostRegion.create(nbytes, shareable)
    except OSError as error:
        raise out_of_memory(
            f"asked for {nbytes} bytes, the kernel refused: {error}", nbytes
        ) from error
    if region.offset:
        _warn_of_descriptors()
    return region


@functools.cache
def _warn_of_descriptors() -> None:
    """Say once that this process runs short of descriptors, while all still works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    logger.warning(
        "a quarter of the %d descriptors that this process may have (RLIMIT_NOFILE) are in use: the"
        " memory of caches shares one from now on, and the rest is kept for links; `ulimit -n`"
        " before it starts, or resource.setrlimit(), raises it up to %d",
        soft,
        hard,
    )


def offsets_of(
    count: int, nbytes: int, check_total: Callable[[int], None]
) -> tuple[list[int], int]:
    """Where ``count`` tensors of ``nbytes`` start in a region, and the bytes of all of them.

    Args:
        count: Number of tensors.
        nbytes: Bytes of one.
        check_total: Refuses more bytes than there can be, before a list is made that would not fit
            either.

    Raises:
        LLMParamError: ``count`` is not positive.
    """
    if count <= 0:
        raise error_for(LLMStatusCode.LLM_PARAM_INVALID, f"{count} tensors: at least 1 is needed")
    step = -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    total = (count - 1) * step + nbytes
    check_total(total)
    return list(range(0, count * step, step)), total


def out_of_memory(
    message: str,
    requested: int,
    memory: dict[str, int] | None = None,
    remedy: str = "ask for fewer or smaller tensors, or free memory.",
) -> LLMOutOfMemoryError:
    """The error for host memory that can't be had, with what is available now.

    Args:
        message: What was asked for, and why it can't be had.
        requested: Its bytes.
        memory: /proc/meminfo, if it has been read already.
        remedy: What to do about it.
    """
    memory = _meminfo_bytes() if memory is None else memory
    available = memory.get("MemAvailable")
    return LLMOutOfMemoryError(
        f"{message}; available now: {'unknown' if available is None else f'{available} bytes'}",
        requested_bytes=requested,
        free_bytes=available,
        remedy=remedy,
    )


def available_bytes() -> int | None:
    """Host memory that is free or can be freed at once; None where the kernel does not say."""
    return _meminfo_bytes().get("MemAvailable")


def _meminfo_bytes() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where it can't be read."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}

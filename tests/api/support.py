# SPDX-License-Identifier: Apache-2.0
"""What the API tests share: descriptions, failing calls, and a look behind the public API."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMCacheNotFoundError,
    LLMDataDist,
    LLMException,
    Placement,
)
from llm_datadist_torch.caches.entry import name_of
from llm_datadist_torch.values.status import LLMStatusCode
from tests.devices import default_device, device_of, on_npu, raw

PI = LLMStatusCode.LLM_PARAM_INVALID
KNE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
OOM = LLMStatusCode.LLM_OUT_OF_MEMORY
FAILED = LLMStatusCode.LLM_FAILED
INVALID = 2**64 - 1
PAGE = 1 << 16

Fault = type[Exception] | LLMStatusCode


@contextmanager
def raises(fault: Fault, match: str | None = None) -> Iterator[None]:
    """A status stands for the LLMException that carries it, an exception class for itself only."""
    expected = LLMException if isinstance(fault, LLMStatusCode) else fault
    with pytest.raises(expected, match=match) as caught:
        yield
    if isinstance(fault, LLMStatusCode):
        assert caught.value.status_code == fault
    else:
        # LLMParamError is a ValueError too, but a plain ValueError is meant here.
        assert not isinstance(caught.value, LLMException), repr(caught.value)


def desc(
    num_tensors: int = 2,
    shape: tuple[int, ...] | list[int] = (4, 8),
    dtype: DataType = DataType.DT_INT32,
    placement: Placement = Placement.DEVICE,
    **kwargs: int,
) -> CacheDesc:
    return CacheDesc(num_tensors, shape, dtype, placement, **kwargs)


def host(*args: object, **kwargs: object) -> CacheDesc:
    return desc(*args, placement=Placement.HOST, **kwargs)


def tensors_of(description: CacheDesc, fill: int = 0) -> list[torch.Tensor]:
    """Tensors that fit a description, where memory of its placement has to be."""
    shape, dtype = description.dims, description.torch_dtype
    device = device_of(description.placement)
    return [
        torch.full(shape, fill, dtype=dtype, device=device) for _ in range(description.num_tensors)
    ]


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor that a DEVICE cache may be made of."""
    return torch.zeros(shape, dtype=dtype, device=default_device())


def counters(datadist: LLMDataDist) -> tuple[object, ...]:
    """Everything that a failed call must leave as it was."""
    instance = datadist._instance
    stats = tuple(getattr(memory, "stats", None) for memory in instance._memories.values())
    return len(instance.catalog), instance.catalog.num_keys, stats


def pool_stats(datadist: LLMDataDist, placement: Placement = Placement.DEVICE) -> object:
    return datadist._instance._memories[placement].stats


def data(cache: object) -> list[bytes]:
    return [raw(tensor) for tensor in cache.tensors]


def scramble(tensors: object, seed: int = 0) -> None:
    """Fills tensors of any dtype and stride with random bytes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        for row in tensor:
            flat = row.reshape(-1).view(torch.uint8)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_pages(nbytes: int) -> int:
    """Memory that nothing in Python knows of."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    return address


def unmap(address: int, nbytes: int) -> None:
    assert _libc.munmap(address, nbytes) == 0


def protect(address: int, nbytes: int, protection: int) -> None:
    assert _libc.mprotect(address, nbytes, protection) == 0


def regions() -> int:
    """How many shareable regions this process has mapped, and blocks of an NPU allocated."""
    gc.collect()  # what other tests left behind
    blocks = torch.npu.memory_stats().get("allocation.all.current", 0) if on_npu() else 0
    maps = Path("/proc/self/maps").read_text().splitlines()
    return blocks + sum("memfd" in line and "datadist" in line for line in maps)


def page_desc(num_tensors: int = 1, rows: int = 4) -> CacheDesc:
    """Tensors of exactly one 64 KiB page."""
    return desc(num_tensors, (rows, PAGE // rows), DataType.DT_INT8)


def bound(datadist: LLMDataDist, key: CacheKey | BlocksCacheKey) -> tuple[int, int] | None:
    try:
        found = datadist._instance.catalog.resolve_key(name_of(key))
    except LLMCacheNotFoundError:
        return None
    return found.entry.cache_id, found.row


def ids(*pairs: tuple[int, int]) -> torch.Tensor:
    """(source, destination) pairs as the tensor form of a mapping."""
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def address_of(text: str) -> tuple[str, int]:
    ip, port = text.split(":")
    return ip, int(port)

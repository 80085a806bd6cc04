# SPDX-License-Identifier: Apache-2.0
"""Memory that the caller brings, as ints or tensors, checked before a cache is made of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, TypeAlias

import torch

from llm_datadist_torch.memory import npu_address, pinned
from llm_datadist_torch.memory.address import HOST, address_tensor, describe_tensors, tensors_over
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.data_type import DataType, itemsize, to_torch_dtype

if TYPE_CHECKING:
    from llm_datadist_torch.values.cache_desc import CacheDesc
    from llm_datadist_torch.values.layout import Layout

UINT64_END = 2**64

Given: TypeAlias = "list[int] | list[torch.Tensor] | tuple[torch.Tensor, ...]"
"""The caller's memory: one address, or one tensor, per tensor of the cache."""


@dataclass(frozen=True)
class Adopted:
    """Checked memory of the caller's.

    Attributes:
        tensors: The given tensors, or views over the given addresses.
        addrs: Their addresses, int64 [num_tensors].
        layout: The cache's layout, with the row stride of the given tensors.
        unowned: Given as ints: nothing keeps this memory alive.
        watched: The tensors that must stay where they are: ours, and the caller's own, which may
            get another storage than ours.
    """

    tensors: tuple[torch.Tensor, ...]
    addrs: torch.Tensor
    layout: Layout
    unowned: bool
    watched: tuple[torch.Tensor, ...]


def check_given(addrs: object) -> None:
    """Check the type of an ``addrs`` argument: a list of ints, or a list or tuple of tensors.

    Raises:
        TypeError: Anything else; a bool is not an address.
        ValueError: An int that is no unsigned 64-bit number.
    """
    items = addrs if isinstance(addrs, (list, tuple)) else ()
    tensors = bool(items) and isinstance(items[0], torch.Tensor)
    # A tuple of tensors is what `Cache.tensors` gives; of ints the reference takes lists only.
    if not isinstance(addrs, list) and not tensors:
        raise TypeError(
            "addrs must be a list of int, or a list or tuple of torch.Tensor, got"
            f" {type(addrs).__name__}"
        )
    wanted = torch.Tensor if tensors else Integral
    for at, item in enumerate(items):
        if not isinstance(item, wanted) or isinstance(item, bool):
            name = "torch.Tensor" if tensors else "int"
            raise TypeError(f"addrs[{at}] must be {name}, got {type(item).__name__}")
        if isinstance(item, Integral) and not 0 <= operator.index(item) < UINT64_END:
            raise ValueError(f"addrs[{at}]={item} is no address: it must be in [0, 2**64)")


def storage_form(shape: Sequence[int], data_type: DataType) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensors that hold ``data_type``.

    What torch has no dtype for becomes bytes.

    Raises:
        LLMParamError: ``data_type`` is None.
    """
    if data_type is None:
        raise param_error("the cache_desc has no data_type")
    if data_type is DataType.DT_STRING:
        return (*shape, itemsize(data_type)), torch.uint8
    return tuple(shape), to_torch_dtype(data_type)


def adopt(
    given: Given,
    desc: CacheDesc,
    layout: Layout,
    device: torch.device = HOST,
) -> Adopted:
    """Check the caller's memory and wrap it. Does not block, copies nothing.

    Args:
        given: One entry per tensor, checked by :func:`check_given`.
        desc: Describes the cache.
        layout: The layout of densely packed tensors of ``desc``.
        device: Where it must be: the CPU, or an NPU with its index.

    Raises:
        LLMParamError: Wrong count, address 0, memory that isn't this device's, or not mapped,
            readable and writable; tensors that don't fit ``desc``, or that overlap.
    """
    if len(given) != desc.num_tensors:
        raise param_error(
            f"{len(given)} addrs for a cache_desc with num_tensors={desc.num_tensors}"
        )
    shape, dtype = storage_form(desc.dims, desc.data_type)
    unowned = not isinstance(given[0], torch.Tensor)
    if unowned:
        numbers = [operator.index(item) for item in given if isinstance(item, Integral)]
        _check_apart(numbers, desc.size)
        tensors = tuple(tensors_over(numbers, shape, dtype, device))
        addrs, watched = address_tensor(numbers), tensors
    else:
        items = tuple(item for item in given if isinstance(item, torch.Tensor))
        addrs, row_stride_bytes = describe_tensors(items, shape, dtype, device)
        tensors, layout = (
            _in_shape(items, shape),
            replace(layout, row_stride_bytes=row_stride_bytes),
        )
        watched = (*tensors, *items)
    if device == HOST:
        pinned.warn_of_pageable(tensors)
    else:
        npu_address.warn_of_expandable(tensors)
    return Adopted(tensors, addrs, layout, unowned, watched)


def _in_shape(
    tensors: tuple[torch.Tensor, ...], shape: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach() if t.shape == shape else t.detach().view(shape) for t in tensors)


def _check_apart(addrs: list[int], nbytes: int) -> None:
    """Overlapping tensors would let one layer overwrite another."""
    order = sorted(range(len(addrs)), key=addrs.__getitem__)
    for low, high in pairwise(order):
        if addrs[high] - addrs[low] < nbytes and addrs[low]:
            raise param_error(
                f"addrs[{low}]={addrs[low]:#x} and addrs[{high}]={addrs[high]:#x} overlap: each"
                f" tensor has {nbytes} bytes"
            )

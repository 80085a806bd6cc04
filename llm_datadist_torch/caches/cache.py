# SPDX-License-Identifier: Apache-2.0
"""``Cache``: a KV cache that is PyTorch tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from llm_datadist_torch.caches.guard import make_guard
from llm_datadist_torch.memory.adopt import adopt, check_given
from llm_datadist_torch.observe import html
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.layout import Layout, layout_of
from llm_datadist_torch.values.status import LLMStatusCode, error_for

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from llm_datadist_torch import _C

CPU_CACHE_ID = -1


class Cache:
    """``num_tensors`` equal tensors: contiguous (rows = batch) or paged (blocks).

    Caches come from :class:`~llm_datadist_torch.CacheManager` or from :meth:`create_cpu_cache`;
    they are not constructed directly.

    Memory: the cache holds the references that keep its tensors alive. A tensor that was taken
    from it stays valid for as long as it is referenced, also after the cache is deallocated. A
    cache registered by bare addresses is the exception: nothing can keep that memory alive.

    As a context manager it ends itself: ``with manager.allocate_cache(desc) as cache: ...``
    deallocates (or unregisters) on exit.

    Thread safety: reading is safe from any thread; ending a cache while another thread takes
    tensors from it gives that thread either the tensors or a typed error.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensors: Sequence[torch.Tensor],
        layout: Layout,
        *,
        is_registered: bool,
        is_unowned: bool = False,
        guard: _C.CacheGuard | None = None,
        end: Callable[[Cache], None] | None = None,
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._tensors: tuple[torch.Tensor, ...] = tuple(tensors)
        self._layout = layout
        self._is_registered = is_registered
        self._is_unowned = is_unowned
        self._guard = guard
        self._end = end
        self._device = self._tensors[0].device
        self._dims = list(cache_desc.dims)  # the desc's shape is the caller's, who may change it
        self._ended_by = ""
        self._tensors_per_layer = 2
        self._name: str | int | None = None

    # -- what the reference has -------------------------------------------------------------------

    @property
    def cache_id(self) -> int:
        """The id that peers use; -1 for a cache from :meth:`create_cpu_cache`."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description it was made from, the caller's own object."""
        return self._cache_desc

    @property
    def tensor_addrs(self) -> list[int]:
        """Address of each tensor; empty once the cache has ended (reference API, 9.1)."""
        return [tensor.data_ptr() for tensor in self._tensors]

    @property
    def is_blocks_cache(self) -> bool:
        """Whether it is paged."""
        return self._layout.paged

    @classmethod
    def create_cpu_cache(
        cls,
        cache_desc: CacheDesc,
        addrs: list[int] | list[torch.Tensor] | tuple[torch.Tensor, ...],
    ) -> Cache:
        """Wrap host memory as a blocks cache for ``swap_blocks`` (reference API, 7.3).

        Does not block, copies nothing.

        Args:
            cache_desc: Its placement must be ``Placement.HOST``.
            addrs: One entry per tensor: ``data_ptr()`` ints of pinned (or plain) CPU tensors, or
                the tensors themselves. Tensors are kept alive by the cache and may be views whose
                blocks are each contiguous. Memory given as ints stays the caller's: keep it until
                the cache has ended. Each int must be mapped, readable and writable over the whole
                tensor.

        Returns:
            A cache with id -1; no instance knows it, so it can't be pulled, pushed or looked up.

        Raises:
            TypeError: ``addrs`` is not a list (or tuple of tensors), or has other items than ints,
                or tensors, in it.
            AttributeError: ``cache_desc`` is None.
            LLMParamError: Wrong placement or count, an address that isn't usable (with its index),
                tensors of other shape or dtype.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_given(addrs)
        if cache_desc.placement != Placement.HOST:
            raise error_for(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"create_cpu_cache wants placement HOST, got {cache_desc.placement!s}",
            )
        layout = layout_of(cache_desc.num_tensors, cache_desc.dims, cache_desc.size, paged=True)
        adopted = adopt(addrs, cache_desc, layout)
        return cls(
            CPU_CACHE_ID,
            cache_desc,
            adopted.tensors,
            adopted.layout,
            is_registered=True,
            is_unowned=adopted.unowned,
            guard=make_guard(
                "the host cache", adopted.addrs, adopted.layout.extent, adopted.watched
            ),
        )

    # -- beyond -----------------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, each of ``cache_desc.shape``; writes to them are writes to the cache.

        Raises:
            LLMCacheNotFoundError: The cache has been deallocated, unregistered, or its instance
                finalized.
        """
        tensors = self._tensors
        if not tensors:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"cache {self._cache_id} has ended ({self._ended_by})",
                cache_id=self._cache_id,
                remedy="take tensors before ending a cache; they stay valid.",
            )
        return tensors

    @property
    def tensors_per_layer(self) -> int:
        """How many tensors make a layer: what :meth:`layer` and the front door go by.

        2, K and V, unless ``Node.allocate`` or ``Node.register`` was told otherwise. The methods of
        ``CacheManager`` go by their own argument.
        """
        return self._tensors_per_layer

    @property
    def name(self) -> str | int | None:
        """What ``Node.allocate`` or ``Node.register`` was told that peers call it; None: nothing.

        ``CacheManager`` binds keys to caches instead, and leaves this None.
        """
        return self._name

    def set_name(self, name: str | int | None) -> None:
        """Set :attr:`name`, which is shown to people; binds no key. The front door calls it."""
        self._name = name

    def group_layers(self, tensors_per_layer: int) -> None:
        """Set :attr:`tensors_per_layer`.

        Args:
            tensors_per_layer: Tensors of a layer; ``num_tensors`` must be a multiple of it.

        Raises:
            TypeError: It is not an int.
            LLMParamError: It is less than 1, or ``num_tensors`` is no multiple of it.
        """
        count = operator.index(tensors_per_layer)
        if count < 1 or self._cache_desc.num_tensors % count:
            raise param_error(
                f"tensors_per_layer={count} does not divide the {self._cache_desc.num_tensors}"
                f" tensors of cache {self._cache_id}"
            )
        self._tensors_per_layer = count

    def layer(
        self, index: int, tensor_num_per_layer: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The tensors of one layer, K and V by default.

        Args:
            index: Layer, from 0.
            tensor_num_per_layer: Tensors of a layer, at least 1. None: :attr:`tensors_per_layer`.

        Raises:
            IndexError: No such layer.
            LLMParamError: ``tensor_num_per_layer`` is less than 1.
            LLMCacheNotFoundError: The cache has ended.
        """
        tensors = self.tensors
        if tensor_num_per_layer is None:
            tensor_num_per_layer = self._tensors_per_layer
        index, tensor_num_per_layer = operator.index(index), operator.index(tensor_num_per_layer)
        if tensor_num_per_layer < 1:
            raise param_error(f"tensor_num_per_layer={tensor_num_per_layer} must be at least 1")
        layers = len(tensors) // tensor_num_per_layer
        if not 0 <= index < layers:
            raise IndexError(f"layer {index} is out of range [0, {layers})")
        return tensors[index * tensor_num_per_layer : (index + 1) * tensor_num_per_layer]

    def block(self, index: int) -> tuple[torch.Tensor, ...]:
        """One block (or one row of a contiguous cache) of every tensor, as views of ``shape[1:]``.

        Args:
            index: Block or row, from 0.

        Raises:
            IndexError: No such block.
            LLMCacheNotFoundError: The cache has ended.
        """
        tensors = self.tensors
        if not 0 <= index < self._layout.rows:
            raise IndexError(
                f"{self._layout.unit} {index} is out of range [0, {self._layout.rows})"
            )
        return tuple(tensor[index] for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, without padding."""
        return self._layout.num_tensors * self._layout.rows * self._layout.row_bytes

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._device

    @property
    def layout(self) -> Layout:
        """Rows and their distances: the geometry that copies and transfers use."""
        return self._layout

    @property
    def is_registered(self) -> bool:
        """Whether its memory is the caller's rather than allocated by this library."""
        return self._is_registered

    @property
    def is_unowned(self) -> bool:
        """Whether its memory was given as bare addresses, so that nothing keeps it alive."""
        return self._is_unowned

    @property
    def ended(self) -> bool:
        """Whether it has been deallocated or unregistered, or its instance finalized."""
        return not self._tensors

    def invalidate(self, ended_by: str) -> None:
        """Drop the memory; called by the operation that ends the cache.

        Args:
            ended_by: That operation's name, for later messages.
        """
        self._tensors = ()
        self._guard = None
        self._ended_by = ended_by

    def lease(self) -> _C.Lease[Cache]:
        """Keep the memory in place for an operation of this library; a context manager.

        Raises:
            LLMCacheNotFoundError: The cache has ended, or one of its tensors has moved: the message
                says which, and what does that.
        """
        guard = self._guard
        if guard is None:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"cache {self._cache_id} has ended ({self._ended_by})",
                cache_id=self._cache_id,
            )
        return guard.acquire(self)

    def __enter__(self) -> Self:
        """The cache itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the cache unless it has ended already."""
        if self.ended:
            return
        if self._end is None:
            self.invalidate("context manager exit")
        else:
            self._end(self)

    def __str__(self) -> str:
        """The text that the reference prints."""
        return (
            f"Cache(cache_id = {self._cache_id}, device_tensor_addrs = {len(self._tensors)},"
            f" is_blocks_cache = {self._layout.paged})"
        )

    def _repr_html_(self) -> str:
        """What notebooks show: shape, memory and a picture of neither data nor secrets."""
        desc, layout = self._cache_desc, self._layout
        unit = "blocks" if layout.paged else "rows"
        facts = [
            ("tensors", f"{desc.num_tensors} x {list(self._dims)} {desc.data_type.name}"),
            ("layers", f"of {self._tensors_per_layer} tensors"),
            (unit, f"{layout.rows} of {html.size(layout.row_bytes)} per tensor"),
            ("bytes", html.size(self.nbytes)),
            ("device", f"{self._device} ({desc.placement.name})"),
            ("memory", "registered" if self._is_registered else "allocated"),
        ]
        if self.ended:
            facts.append(("ended by", self._ended_by))
        name = "" if self._name is None else f" {self._name!r}"
        return html.facts_html(f"Cache {self._cache_id}{name}", facts)

    def __repr__(self) -> str:
        """What the cache is and where, without its data."""
        desc, kind = self._cache_desc, "blocks" if self._layout.paged else "contiguous"
        origin = "registered" if self._is_registered else "allocated"
        if self._cache_id == CPU_CACHE_ID:  # no instance knows it
            origin = "wrapped"
        state = f"ended by {self._ended_by}" if self.ended else origin
        name = "" if self._name is None else f"name={self._name!r}, "
        return (
            f"Cache(id={self._cache_id}, {name}{kind}, {desc.num_tensors} x {self._dims}"
            f" {desc.data_type.name},"
            f" {self.nbytes} bytes on {self._device} ({desc.placement.name}), {state})"
        )

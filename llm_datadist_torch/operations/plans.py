# SPDX-License-Identifier: Apache-2.0
"""Which bytes a pull or a push moves, once both caches are known (reference API, 9.3, 9.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm_datadist_torch import geometry
from llm_datadist_torch.geometry import Layout
from llm_datadist_torch.links.messages import CacheView
from llm_datadist_torch.values.checks import INT64_MAX, param_error
from llm_datadist_torch.values.status import LLMStatusCode, error_for

ADDRESS_BYTES = 8


@dataclass
class RemoteCache:
    """A peer's cache, for one transfer.

    Attributes:
        view: What the peer said of it.
        layout: Where its rows lie.
        addrs: Its tensors' addresses in the peer's process, int64 [num_tensors].
        fetched: Set when a pull has completely read tensors [start, stop) of the row.
    """

    view: CacheView
    layout: Layout
    addrs: torch.Tensor
    fetched: tuple[int, int] | None = None

    @classmethod
    def of(cls, view: CacheView) -> RemoteCache:
        """The cache that a peer has described.

        Raises:
            LLMException: What it says can't be true of any cache.
        """
        layout = Layout(view.num_tensors, view.rows, view.row_bytes, view.pitch, view.paged)
        numbers = (layout.num_tensors, layout.rows, layout.row_bytes, layout.pitch)
        if (
            min(numbers) < 1
            or layout.pitch < layout.row_bytes
            or layout.extent > INT64_MAX
            or len(view.addrs) != layout.num_tensors * ADDRESS_BYTES
        ):
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"the peer says of its cache {view.cache_id} what no cache is: {numbers} tensors,"
                f" rows, bytes of a row and between two, and {len(view.addrs)} bytes of addresses",
            )
        return cls(view, layout, torch.frombuffer(bytearray(view.addrs), dtype=torch.int64))


@dataclass(frozen=True)
class Plan:
    """What a transfer moves, once both caches are known.

    Attributes:
        local: Local tensors, by index.
        remote: Their partners.
        runs: int64 [n, 3], columns (local offset, remote offset, nbytes).
    """

    local: range
    remote: range
    runs: torch.Tensor


def row_pull(
    batch_index: int, size: int, src_layers: range | None, dst_layers: range | None, per_layer: int
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``pull_cache``: the first bytes of the peer's row into row ``batch_index``."""

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        dst, src = geometry.pulled_tensors(
            local.num_tensors, remote.layout.num_tensors, dst_layers, src_layers, per_layer
        )
        nbytes = local.row_bytes if size == -1 else size
        return Plan(
            dst,
            src,
            geometry.row_to_row(local, remote.layout, batch_index, remote.view.row, nbytes),
        )

    return plan


def block_pull(
    src_blocks: torch.Tensor | None,
    dst_blocks: torch.Tensor,
    src_layers: range | None,
    dst_layers: range | None,
    per_layer: int,
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``pull_blocks``.

    The peer's blocks, or (``src_blocks`` None) its row, into ``dst_blocks``.
    """

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        dst, src = geometry.pulled_tensors(
            local.num_tensors, remote.layout.num_tensors, dst_layers, src_layers, per_layer
        )
        if src_blocks is None:
            return Plan(
                dst, src, geometry.row_to_blocks(local, remote.layout, dst_blocks, remote.view.row)
            )
        return Plan(
            dst, src, geometry.blocks_to_blocks(local, remote.layout, dst_blocks, src_blocks)
        )

    return plan


def row_push(src_batch_index: int, src: range, dst: range) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``push_cache``.

    One whole local row into the peer's row (section 14, 11: it must fit).
    """

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        check_remote_tensors(dst, remote)
        runs = geometry.row_to_row(
            remote.layout, local, remote.view.row, src_batch_index, local.row_bytes
        )
        return Plan(src, dst, local_first(runs))

    return plan


def block_push(
    src_blocks: torch.Tensor, dst_blocks: torch.Tensor, src: range, dst: range
) -> Callable[[Layout, RemoteCache], Plan]:
    """Plan of ``push_blocks``: local blocks into the peer's blocks."""

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        check_remote_tensors(dst, remote)
        runs = geometry.blocks_to_blocks(remote.layout, local, dst_blocks, src_blocks)
        return Plan(src, dst, local_first(runs))

    return plan


def local_first(runs: torch.Tensor) -> torch.Tensor:
    """Geometry's runs begin with the destination; a movement's begin with this side."""
    return runs[:, [1, 0, 2]].contiguous()


def check_remote_tensors(dst: range, remote: RemoteCache) -> None:
    """Check that a push's destination tensors are in the peer's cache.

    Raises:
        LLMParamError: They aren't.
    """
    if dst.stop > remote.layout.num_tensors:
        raise param_error(
            f"dst_layer_range ends at tensor {dst.stop}, but the peer's cache has"
            f" {remote.layout.num_tensors}"
        )

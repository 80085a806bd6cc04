# SPDX-License-Identifier: Apache-2.0
"""Which bytes move: pure arithmetic from layouts, ids, rows and layer ranges to runs.

Nothing here touches memory, devices or peers. A *run* is ``(destination offset, source offset,
nbytes)``, in bytes from the base of a tensor; one list of runs holds for every tensor pair of a
movement.
"""

from __future__ import annotations

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.checks import layer_count, param_error
from llm_datadist_torch.values.layout import Layout


def check_rows(name: str, ids: torch.Tensor, layout: Layout, *, unique: bool = False) -> None:
    """Check that every id names a row or block of ``layout``.

    Args:
        name: How the caller calls the ids.
        ids: int64 tensor of shape [n].
        layout: The cache they belong to.
        unique: Refuse an id that is given twice; for destinations, where it would be undefined
            which write wins.

    Raises:
        LLMParamError: An id outside ``[0, layout.rows)``, or a repeated one, with its position.
    """
    try:
        _C.check_ids(name, ids, layout.rows, unique)
    except (IndexError, ValueError) as error:
        raise param_error(str(error)) from None


def check_row(name: str, row: int, layout: Layout) -> None:
    """Check that ``row`` names a row of ``layout``.

    Raises:
        LLMParamError: It is outside ``[0, layout.rows)``.
    """
    if not 0 <= row < layout.rows:
        raise param_error(f"{name}={row} is out of range [0, {layout.rows})")


def row_to_row(dst: Layout, src: Layout, dst_row: int, src_row: int, nbytes: int) -> torch.Tensor:
    """The run that moves the first ``nbytes`` of one row into another.

    Args:
        dst: Destination layout.
        src: Source layout.
        dst_row: Row written.
        src_row: Row read.
        nbytes: Bytes per tensor, counted from the start of both rows.

    Returns:
        Runs, an int64 tensor of shape [1, 3].

    Raises:
        LLMParamError: A row out of range, or bytes that don't fit one of the rows.
    """
    for name, layout, row in (("destination", dst, dst_row), ("source", src, src_row)):
        check_row(f"{name} row", row, layout)
        if nbytes > layout.row_bytes:
            raise param_error(
                f"{nbytes} bytes do not fit a {name} row of {layout.row_bytes} bytes",
                remedy="pass size= with the bytes that both rows have.",
            )
    return torch.tensor(
        [[dst_row * dst.row_stride_bytes, src_row * src.row_stride_bytes, nbytes]],
        dtype=torch.int64,
    )


def blocks_to_blocks(
    dst: Layout, src: Layout, dst_blocks: torch.Tensor, src_blocks: torch.Tensor
) -> torch.Tensor:
    """Runs that move block ``src_blocks[k]`` into block ``dst_blocks[k]``, adjacent pairs merged.

    Args:
        dst: Destination layout.
        src: Source layout.
        dst_blocks: Blocks written, int64 [n]; :func:`check_rows` has passed them.
        src_blocks: Blocks read, int64 [n]; :func:`check_rows` has passed them.

    Returns:
        Runs, an int64 tensor of shape [at most n, 3].

    Raises:
        LLMParamError: Different lengths or block sizes.
    """
    if len(dst_blocks) != len(src_blocks):
        raise param_error(f"{len(src_blocks)} src_blocks for {len(dst_blocks)} dst_blocks")
    if dst.row_bytes != src.row_bytes:
        raise param_error(
            f"block sizes differ: source {src.row_bytes} bytes, destination {dst.row_bytes} bytes"
        )
    return _C.block_runs(
        dst_blocks, src_blocks, dst.row_stride_bytes, src.row_stride_bytes, dst.row_bytes
    )


def row_to_blocks(dst: Layout, src: Layout, dst_blocks: torch.Tensor, src_row: int) -> torch.Tensor:
    """Runs that cut one contiguous row into the listed blocks, in their order.

    The last piece of a row that is no multiple of the block is short; only its valid bytes are
    written (reference API, 9.3 and its defects 7 and 8).

    Args:
        dst: Layout of the blocks cache.
        src: Layout of the contiguous cache.
        dst_blocks: Blocks written, int64 [n]; :func:`check_rows` has passed them. Block
            ``dst_blocks[k]`` gets the k-th piece.
        src_row: Row read.

    Returns:
        Runs, an int64 tensor of shape [at most n, 3].

    Raises:
        LLMParamError: The row is out of range, a block larger than the row, more blocks than the
            row fills.
    """
    check_row("source row", src_row, src)
    if dst.row_bytes > src.row_bytes:
        raise param_error(
            f"a block of {dst.row_bytes} bytes is larger than a row of {src.row_bytes}"
        )
    fillable = -(-src.row_bytes // dst.row_bytes)
    if len(dst_blocks) > fillable:
        raise param_error(
            f"{len(dst_blocks)} dst_blocks, but a row of {src.row_bytes} bytes fills only"
            f" {fillable}"
            f" blocks of {dst.row_bytes} bytes"
        )
    pieces = torch.arange(len(dst_blocks), dtype=torch.int64)
    # Pieces are blocks of the row, one block apart; only then is the short tail cut and the row's
    # place added.
    runs = _C.block_runs(dst_blocks, pieces, dst.row_stride_bytes, dst.row_bytes, dst.row_bytes)
    if len(runs):
        runs[-1, 2] -= max(0, len(dst_blocks) * dst.row_bytes - src.row_bytes)
    runs[:, 1] += src_row * src.row_stride_bytes
    return runs


def local_first(runs: torch.Tensor) -> torch.Tensor:
    """The runs of a write, whose destination comes first, as a movement has them."""
    return runs[:, [1, 0, 2]].contiguous()


def pulled_tensors(
    dst_tensors: int,
    src_tensors: int,
    dst_layers: range | None,
    src_layers: range | None,
    per_layer: int,
) -> tuple[range, range]:
    """Which tensors of both caches a pull pairs (reference API, 9.3).

    Args:
        dst_tensors: Tensors of the local cache.
        src_tensors: Tensors of the peer's cache.
        dst_layers: Local layers, or None for all.
        src_layers: The peer's layers, or None for all.
        per_layer: Tensors of a layer; only used with a layer range.

    Returns:
        Tensor indices (destination, source), equally long.

    Raises:
        LLMParamError: Counts differ, a range is outside its cache, or the local tensors are no
            whole number of layers.
    """
    if dst_layers is None and src_layers is None:
        if dst_tensors != src_tensors:
            raise param_error(f"{src_tensors} source tensors for {dst_tensors} destination tensors")
        return range(dst_tensors), range(src_tensors)
    dst = layer_tensors("dst_layer_range", dst_layers, per_layer, dst_tensors)
    src = _tensors_of("src_layer_range", src_layers, per_layer, src_tensors)
    if layer_count(dst) != layer_count(src):
        raise param_error(f"layer ranges name {len(src)} source and {len(dst)} destination tensors")
    return dst, src


def pushed_tensors(
    src_tensors: int, src_layers: range | None, dst_layers: range | None, per_layer: int
) -> tuple[range, range]:
    """Which tensors a push pairs (reference API, 9.4).

    A missing range means all layers of the *source*.

    Args:
        src_tensors: Tensors of the local cache.
        src_layers: Local layers, or None.
        dst_layers: The peer's layers, or None.
        per_layer: Tensors of a layer.

    Returns:
        Tensor indices (source, destination), equally long. The destination's end is checked when
        the peer's cache is known.

    Raises:
        LLMParamError: Local tensors are no whole number of layers, ranges differ in length or are
            outside the cache.
    """
    everything = range(src_tensors // per_layer)
    src = everything if src_layers is None else src_layers
    dst = everything if dst_layers is None else dst_layers
    if layer_count(src) != layer_count(dst):
        raise param_error(
            f"src_layer_range has {layer_count(src)} layers, dst_layer_range {layer_count(dst)}"
        )
    return (
        layer_tensors("src_layer_range", src, per_layer, src_tensors),
        range(dst.start * per_layer, dst.stop * per_layer),
    )


def layer_tensors(name: str, layers: range | None, per_layer: int, num_tensors: int) -> range:
    """The tensors of some layers of the local cache, which must be a whole number of layers.

    Args:
        name: How the caller calls the range.
        layers: Layers, or None for all.
        per_layer: Tensors of a layer.
        num_tensors: Tensors of the cache.

    Raises:
        LLMParamError: The cache is no whole number of layers, or the range is outside it.
    """
    if num_tensors % per_layer:
        raise param_error(
            f"{num_tensors} tensors are no multiple of tensor_num_per_layer={per_layer}"
        )
    return _tensors_of(name, layers, per_layer, num_tensors)


def _tensors_of(name: str, layers: range | None, per_layer: int, num_tensors: int) -> range:
    if layers is None:
        return range(num_tensors)
    tensors = range(layers.start * per_layer, layers.stop * per_layer)
    if tensors.stop > num_tensors:
        raise param_error(
            f"{name}={layers} with {per_layer} tensors per layer ends at tensor {tensors.stop},"
            f" but the cache has {num_tensors}"
        )
    return tensors

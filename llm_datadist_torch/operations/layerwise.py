# SPDX-License-Identifier: Apache-2.0
"""``transfer_cache_async``: layers go to their targets as they become ready (reference API, 10)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from llm_datadist_torch import geometry, streams
from llm_datadist_torch.cache_entry import CacheEntry
from llm_datadist_torch.geometry import Layout
from llm_datadist_torch.instance import Instance
from llm_datadist_torch.operations import plans, transfers
from llm_datadist_torch.operations.layerwise_arguments import PER_LAYER, Layerwise, Target
from llm_datadist_torch.operations.plans import Plan, RemoteCache
from llm_datadist_torch.operations.transfers import AddressKey, Transfer
from llm_datadist_torch.streams import Stream
from llm_datadist_torch.transports.base import Direction
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.work import CacheTask, StopWorkError, Work, as_failure
from llm_datadist_torch.workers import WorkerPool

logger = logging.getLogger("llm_datadist_torch")

OPERATION = "transfer_cache_async"


def start(instance: Instance, call: Layerwise, timeout: int | None = None) -> CacheTask:
    """Start a layer by layer transfer. Holds a lease on the source until the task is done.

    Raises:
        TypeError, ValueError, LLMParamError: ``timeout``, what each layer may take, is no time.
    """
    timeout = transfers.check_timeout(timeout)
    held = ExitStack()
    layers = call.layers_wanted
    try:
        entry = held.enter_context(instance.using(call.cache))
    except LLMException as error:
        return failed(error, len(call.targets), len(layers))

    def job(work: Work) -> None:
        for layer in layers:
            _send_layer(instance, call, entry, layer, work, timeout)

    return submit(
        instance.layer_workers,
        Work(job, len(call.targets), layers_total=len(layers), release=held.close),
    )


def start_one(
    instance: Instance,
    transfer: Transfer,
    wait_stream: Stream | None,
    timeout: int | None = None,
) -> CacheTask:
    """Start a pull or push. Holds a lease on the local cache until the task is done.

    Raises:
        TypeError: ``wait_stream`` is no stream.
        TypeError, ValueError, LLMParamError: ``timeout`` is no time.
    """
    timeout = transfers.check_timeout(timeout)
    after = streams.point(wait_stream, transfer.cache.device)
    held = ExitStack()
    try:
        transfers.check_peer(instance, transfer)
        entry = held.enter_context(instance.using(transfer.cache))
    except LLMException as error:
        return failed(error, 1, 1)

    def job(work: Work) -> None:
        with work.step(0):
            move = partial(transfers.run_leased, instance, transfer, entry, after, timeout)
            if _attempt(work, 0, move):
                work.succeed(0)
                work.layers_done = 1

    return submit(instance.transfer_workers, Work(job, 1, release=held.close))


def submit(workers: WorkerPool, work: Work) -> CacheTask:
    """Queue work; if that is refused, it has been cancelled and the error is raised."""
    task = CacheTask(work)
    workers.submit(work)
    return task


def failed(error: LLMException, num_results: int, layers_total: int) -> CacheTask:
    """A task that failed before it was queued."""

    def job(work: Work) -> None:
        for index in range(num_results):
            work.fail(index, error)

    work = Work(job, num_results, layers_total=layers_total)
    work.run(lambda: None)
    return CacheTask(work)


# -- the job --------------------------------------------------------------------------------------


def _send_layer(
    instance: Instance,
    call: Layerwise,
    entry: CacheEntry,
    layer: int,
    work: Work,
    timeout: int | None,
) -> None:
    """Wait for one layer and send it to all that want it. Layers nobody wants any more are skipped.

    Raises:
        StopWorkError: The work has been cancelled, or the synchronizer is broken.
    """
    wanting = [
        index
        for index, target in enumerate(call.targets)
        if layer in target.layers and work.results[index] is None
    ]
    if not wanting:
        return
    work.check()
    if not _ready(call, layer, wanting, work):
        return
    for index in wanting:
        target = call.targets[index]
        with work.step(index):
            sent = _attempt(
                work, index, partial(_send, instance, call, entry, target, layer, timeout)
            )
            if sent and layer == target.layers[-1]:
                work.succeed(index)
    work.layers_done += 1


def _ready(call: Layerwise, layer: int, wanting: list[int], work: Work) -> bool:
    """Ask the synchronizer. Its answer False fails those who want the layer, and only them."""
    try:
        ready = call.synchronizer.synchronize_layer(layer, None)
    except Exception as error:
        # It is not asked again: it is broken, not late.
        logger.exception("the synchronizer raised at layer %d", layer)
        failure = as_failure(error)
        for index in wanting:
            work.fail(index, failure)
        raise StopWorkError from error
    work.check()
    if ready:
        return True
    for index in wanting:
        work.fail(
            index,
            param_error(f"the synchronizer said that layer {layer} of the source is not ready"),
        )
    return False


def _attempt(work: Work, index: int, move: Callable[[], None]) -> bool:
    """Move bytes; whether that went well. If not, the result says so, and the rest goes on."""
    try:
        move()
    except LLMException as error:
        logger.warning("background transfer failed: %s", error)
        work.fail(index, error)
    except Exception as error:
        logger.exception("background transfer failed")
        work.fail(index, as_failure(error))
    else:
        return True
    return False


def _send(
    instance: Instance,
    call: Layerwise,
    entry: CacheEntry,
    target: Target,
    layer: int,
    timeout: int | None,
) -> None:
    """Send one layer to one target. Blocks, at most for ``timeout``."""
    at = layer - target.layers.start
    if target.key is not None:
        transfer = _by_key(call, target, layer, target.first_layer + at)
        transfers.check_peer(instance, transfer)
        transfers.run_leased(instance, transfer, entry, timeout=timeout)
        return
    rest = target.addrs[at * PER_LAYER : (at + 1) * PER_LAYER]
    tensor = layer * PER_LAYER
    while rest:
        # Usually one cache has them all, and this is done once.
        sent = _Sent()
        transfer = _by_address(call, target, tensor, rest, sent)
        transfers.check_peer(instance, transfer)
        transfers.run_leased(instance, transfer, entry, timeout=timeout)
        tensor, rest = tensor + sent.count, rest[sent.count :]


# -- what moves -----------------------------------------------------------------------------------


def _local_check(call: Layerwise, target: Target) -> Callable[[Layout], None]:
    """The checks of 10.3 that need only the source."""

    def check(layout: Layout) -> None:
        if call.src_ids is not None:
            if not layout.paged:
                raise param_error("src_block_indices are given, but src_cache is contiguous")
            geometry.check_rows("src_block_indices", call.src_ids, layout)
            if call.block_bytes not in (0, layout.row_bytes):
                raise param_error(
                    f"dst_block_memory_size={call.block_bytes}, but blocks of src_cache have"
                    f" {layout.row_bytes} bytes"
                )
            return
        geometry.check_row("src_batch_index", target.row, layout)
        if call.dst_ids is not None and not 0 < call.block_bytes < layout.rows * layout.row_bytes:
            raise param_error(
                f"dst_block_memory_size={call.block_bytes} must be more than 0 and less than a"
                f" tensor of src_cache, {layout.rows * layout.row_bytes} bytes"
            )

    return check


def _runs(call: Layerwise, target: Target, dst: Layout, dst_row: int, src: Layout) -> torch.Tensor:
    """Which bytes of a tensor go where (the table of 10.3), local side first."""
    if call.dst_ids is None:
        runs = geometry.row_to_row(dst, src, dst_row, target.row, src.row_bytes)
    elif call.src_ids is None:
        runs = geometry.row_to_blocks(dst, src, call.dst_ids, target.row)
    else:
        runs = geometry.blocks_to_blocks(dst, src, call.dst_ids, call.src_ids)
    return plans.local_first(runs)


def _by_key(call: Layerwise, target: Target, layer: int, dst_layer: int) -> Transfer:
    src, dst = _tensors(layer), _tensors(dst_layer)
    key = target.key
    if key is None:
        raise error_for(LLMStatusCode.LLM_FAILED, "a target without a key")

    def plan(local: Layout, remote: RemoteCache) -> Plan:
        plans.check_remote_tensors(dst, remote)
        if call.dst_ids is not None:
            if remote.view.row != 0 and not isinstance(key, BlocksCacheKey):
                raise param_error(
                    f"batch_index={remote.view.row} of the key must be 0 with dst_block_indices"
                )
            _check_block_bytes(call, remote.layout)
        return Plan(src, dst, _runs(call, target, remote.layout, remote.view.row, local))

    # Block indices need blocks; a row may also go to a block that has room for it.
    paged = None if call.dst_ids is None else True
    return Transfer(
        OPERATION, Direction.WRITE, key, call.cache, paged, _local_check(call, target), plan
    )


class _Sent:
    """How many of the addresses a transfer has covered."""

    count = 0


def _by_address(
    call: Layerwise, target: Target, tensor: int, addrs: tuple[int, ...], sent: _Sent
) -> Transfer:
    """Tensors from ``tensor`` on to the first of ``addrs`` that lie in one cache."""

    def plan(local: Layout, remote: RemoteCache) -> list[Plan]:
        pieces = []
        for src, address in enumerate(addrs, tensor):
            dst = remote.layout.tensor_at(remote.addrs, address)
            if dst is None:
                break
            offset = address - int(remote.addrs[dst])
            runs = _runs(call, target, _window(call, remote.layout, offset, local), 0, local)
            runs[:, 1] += offset
            pieces.append(Plan(range(src, src + 1), range(dst, dst + 1), runs))
        if not pieces:
            raise error_for(
                LLMStatusCode.LLM_FAILED, f"the peer named a cache without {addrs[0]:#x}"
            )
        sent.count = len(pieces)
        return pieces

    key = AddressKey(target.cluster_id, addrs[0])
    return Transfer(
        OPERATION, Direction.WRITE, key, call.cache, None, _local_check(call, target), plan
    )


def _window(call: Layerwise, remote: Layout, offset: int, local: Layout) -> Layout:
    """What of a peer's tensor is reachable from ``offset`` on, as the layout that is written to.

    Blocks are counted from there. Where the rows lie apart, an address means one row, or (with
    indices) the blocks from the one that it begins.

    Raises:
        LLMParamError: The blocks differ in size.
    """
    dense = remote.pitch == remote.row_bytes
    if call.dst_ids is None:
        room = remote.extent - offset if dense else remote.row_bytes - offset % remote.pitch
        return Layout(1, 1, room, room, paged=False)
    size = call.block_bytes or local.row_bytes
    if (remote.paged or not dense) and size != remote.row_bytes:
        raise _other_size(size, remote)
    pitch = size if dense else remote.pitch
    if not dense and offset % pitch:
        raise param_error("an address in dst_addrs lies inside a block, not at its beginning")
    return Layout(1, (remote.extent - offset + pitch - size) // pitch, size, pitch, paged=True)


def _check_block_bytes(call: Layerwise, remote: Layout) -> None:
    if call.block_bytes not in (0, remote.row_bytes):
        raise _other_size(call.block_bytes, remote)


def _other_size(size: int, remote: Layout) -> LLMException:
    return param_error(
        f"blocks of {size} bytes are sent, those of the peer have {remote.row_bytes} bytes"
    )


def _tensors(layer: int) -> range:
    return range(layer * PER_LAYER, (layer + 1) * PER_LAYER)

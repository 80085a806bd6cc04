# SPDX-License-Identifier: Apache-2.0
"""Calls work on the instance's device, whatever the thread's is, and leave that as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from tests import simulator_faults as faults
from tests.npu.hixl_pair import OK
from tests.npu.npu_service import NpuService, spawn_npu
from tests.peers import Peer

pytestmark = [pytest.mark.needs_two_npus, pytest.mark.needs_simulated_npu]

MINE, THEIRS = BlocksCacheKey(1, 0), BlocksCacheKey(2, 0)
DESC = CacheDesc(2, [4, 512], DataType.DT_UINT8)
HOST_DESC = CacheDesc(2, [4, 512], DataType.DT_UINT8, Placement.HOST)


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


class Calls:
    """An instance on npu:1, linked to a peer on npu:1; each public call that touches a device."""

    def __init__(self, here: NpuService, there: Peer, port: int) -> None:
        self.here, self.there, self.port = here, there, port
        self.manager = here.manager
        self.blocks = here.allocate("blocks", 2, 4, 512, paged=True, keys=MINE)
        self.paged = here.held["blocks"].cache
        here.allocate("rows", 2, 4, 512, paged=False)
        self.rows = here.held["rows"].cache
        self.host = self.manager.create_host_cache(HOST_DESC)
        self.memory = torch.zeros(2, 4, 512, dtype=torch.uint8, device="npu:1")
        # Taken here: torch itself needs a device that can be used.
        self.tensors = list(self.memory)
        self.ours = [tensor.data_ptr() for tensor in self.tensors]
        self.addresses = there.call("addresses", "theirs")

    def pull_blocks(self) -> None:
        self.manager.pull_blocks(THEIRS, self.paged, [0], [1])

    def pull_blocks_async(self) -> None:
        task = self.manager.pull_blocks_async(THEIRS, self.paged, [0], [1])
        assert task.synchronize() == LLMStatusCode.LLM_SUCCESS, task.exception()

    def pull_cache(self) -> None:
        self.manager.pull_cache(CacheKeyByIdAndIndex(2, 2, 0), self.rows, 1)

    def push_blocks(self) -> None:
        self.manager.push_blocks(THEIRS, self.paged, [0], [1])

    def push_blocks_async(self) -> None:
        task = self.manager.push_blocks_async(THEIRS, self.paged, [0], [1])
        assert task.synchronize() == LLMStatusCode.LLM_SUCCESS, task.exception()

    def transfer_cache_async(self) -> None:
        configs = [TransferConfig(2, self.addresses)]
        task = self.manager.transfer_cache_async(self.paged, Ready(), configs, [0], [0])
        assert task.synchronize() == LLMStatusCode.LLM_SUCCESS, task.exception()

    def allocate_cache(self) -> None:
        self.manager.deallocate_cache(self.manager.allocate_cache(DESC))

    def allocate_host_cache(self) -> None:
        self.manager.deallocate_cache(self.manager.allocate_cache(HOST_DESC))

    def register_ints(self) -> None:
        cache = self.manager.register_blocks_cache(DESC, self.ours)
        self.manager.pull_blocks(THEIRS, cache, [0], [1])
        self.manager.unregister_cache(cache.cache_id)

    def register_tensors(self) -> None:
        cache = self.manager.register_cache(DESC, self.tensors)
        self.manager.unregister_cache(cache.cache_id)

    def copy_blocks(self) -> None:
        self.manager.copy_blocks(self.paged, {0: [3]})

    def copy_cache(self) -> None:
        self.manager.copy_cache(self.rows, self.rows, 3, 0)

    def swap_blocks(self) -> None:
        self.manager.swap_blocks(self.paged, self.host, {0: 0})
        self.manager.swap_blocks(self.host, self.paged, {0: 2})

    def create_cpu_cache(self) -> None:
        host = torch.zeros(2, 4, 512, dtype=torch.uint8)
        cpu = Cache.create_cpu_cache(HOST_DESC, [tensor.data_ptr() for tensor in host])
        self.manager.swap_blocks(self.paged, cpu, {0: 0})

    def unlink_and_link(self) -> None:
        assert self.here.unlink(2, self.port) == OK
        assert self.here.link(2, self.port) == OK

    def look_at_blocks(self) -> None:
        repr(self.paged), self.here.dd.stats(), self.here.dd.links()


NAMES = [name for name in vars(Calls) if not name.startswith("_")]


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    there, here = spawn_npu(), NpuService()
    on_second = {"ge.exec.deviceId": "1"}
    try:
        port = there.call("start", 2, options=on_second)
        there.call("allocate", "theirs", 2, 4, 512, paged=True, keys=THEIRS)
        there.call("allocate", "their rows", 2, 4, 512, paged=False)
        here.start(1, options=on_second)
        assert here.link(2, port) == OK
        yield Calls(here, there, port)
    finally:
        faults.reset()
        here.finish()
        there.close()


def in_a_thread(call: Callable[[], Any]) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001 (shown by whoever asked)
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_device_of_the_thread_stays(calls: Calls, name: str) -> None:
    def call() -> tuple[int, int]:
        torch.npu.set_device(0)
        getattr(calls, name)()
        fresh = torch.empty(1, device="npu").device.index  # what the runtime thinks of it
        return torch.npu.current_device(), fresh

    assert in_a_thread(call) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_thread_without_a_device_and_no_device_0(calls: Calls, name: str) -> None:
    before = torch.npu.memory_allocated(0)
    faults.take_device_away(0)
    try:
        in_a_thread(getattr(calls, name))
    finally:
        faults.reset()
    assert torch.npu.memory_allocated(0) == before
    assert in_a_thread(torch.npu.current_device) == 0

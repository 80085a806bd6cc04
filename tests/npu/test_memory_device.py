# SPDX-License-Identifier: Apache-2.0
"""Which NPU an instance is on, and that its threads know."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch

from llm_datadist_torch import CacheDesc, DataType, LLMParamError, Placement
from llm_datadist_torch.cli import probes
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.memory.device import HostDevice, NpuDevice, choose_device
from llm_datadist_torch.values.deadline import Deadline

DESC = CacheDesc(1, [4, 64], DataType.DT_FLOAT16)
ONE = {"ge.exec.deviceId": "1"}


@pytest.mark.parametrize("wanted", ["auto", "npu"])
@pytest.mark.parametrize("device_id", [0, pytest.param(1, marks=pytest.mark.needs_two_npus)])
def test_an_npu_is_chosen(npu: Any, wanted: str, device_id: int) -> None:
    chosen = choose_device(wanted, device_id)
    assert isinstance(chosen, NpuDevice)
    assert chosen.device == torch.device("npu", device_id)
    assert npu.get_device_name(device_id) in chosen.reason


def test_the_cpu_where_it_is_wanted(instance_factory) -> None:
    assert isinstance(choose_device("cpu", 0), HostDevice)
    manager = instance_factory(**{"llm.Device": "cpu"}).cache_manager
    for placement in Placement:
        desc = CacheDesc(1, [4, 64], DataType.DT_FLOAT16, placement)
        cache = manager.allocate_blocks_cache(desc)
        assert cache.device == torch.device("cpu")
        assert not cache.tensors[0].is_pinned()
    assert manager.register_blocks_cache(DESC, [torch.zeros(4, 64).half()]).device.type == "cpu"


def test_an_index_that_there_is_not(instance_factory, npu: Any) -> None:
    count = npu.device_count()
    with pytest.raises(LLMParamError, match=f"device_id={count} is out of range"):
        instance_factory(**{"ge.exec.deviceId": str(count)})


@pytest.mark.needs_two_npus
def test_two_instances_on_two_npus(instance_factory, npu: Any) -> None:
    managers = [instance_factory().cache_manager, instance_factory(**ONE).cache_manager]
    assert npu.current_device() == 0
    caches = [manager.allocate_blocks_cache(DESC) for manager in managers]
    assert [cache.device.index for cache in caches] == [0, 1]
    for cache, value in zip(caches, (3, 4), strict=True):
        cache.tensors[0].fill_(value)
    for cache, value in zip(caches, (3, 4), strict=True):
        assert cache.tensors[0].cpu().unique().tolist() == [value]
    assert npu.current_device() == 0
    with pytest.raises(LLMParamError, match="is on npu:0, the cache is on npu:1"):
        managers[1].register_blocks_cache(DESC, [caches[0].tensors[0]])


@pytest.mark.needs_two_npus
def test_threads_of_a_pool_are_on_the_device(npu: Any) -> None:
    found: list[int] = []

    class Look:
        def run(self, _: object) -> bool:
            found.append(npu.current_device())
            return False

        def cancel(self) -> bool:
            return False

        def wait(self, _: float | None = None) -> bool:
            return True

    for index in (1, 0):
        pool = WorkerPool("test", 1, choose_device("npu", index).enter_thread)
        pool.submit(Look())  # type: ignore[arg-type]
        for _ in range(1000):
            if len(found) == 2 - index:
                break
            threading.Event().wait(0.01)
        pool.close(Deadline.after_ms(5000))
    assert found == [1, 0]


@pytest.mark.needs_two_npus
def test_the_link_thread_is_on_the_device(instance_factory, npu: Any) -> None:
    datadist = instance_factory(**ONE)
    endpoint = datadist._instance.links.endpoint
    found: list[int] = []
    done = threading.Event()
    endpoint.loop.submit(lambda: (found.append(npu.current_device()), done.set()))
    assert done.wait(30)
    assert found == [1]


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.needs_two_npus
def test_nothing_touches_a_device_before_init() -> None:
    program = """
        import torch
        import llm_datadist_torch as lib
        config = lib.LLMConfig()
        config.device_id, config.enable_cache_manager = 1, True
        datadist = lib.LLMDataDist(lib.LLMRole.MIX, 1)
        owner = torch.zeros(4, 4)
        desc = lib.CacheDesc(1, [4, 4], torch.float32, lib.Placement.HOST)
        lib.Cache.create_cpu_cache(desc, [owner])
        print(torch.npu.is_initialized())
        datadist.init(config.generate_options())
        cache = datadist.cache_manager.allocate_cache(lib.CacheDesc(1, [4, 4], torch.float32))
        print(torch.npu.is_initialized(), cache.device, torch.npu.current_device())
        datadist.finalize()
    """
    # torch_npu has its own lines to say on stdout.
    assert run(program).split()[-4:] == ["False", "True", "npu:1", "0"]


def test_a_forked_child_of_a_process_that_uses_an_npu() -> None:
    program = """
        import multiprocessing, torch
        from llm_datadist_torch import LLMDeviceError
        from llm_datadist_torch.memory.device import choose_device
        torch.zeros(1, device="npu:0")
        def work():
            try:
                choose_device("auto", 0)
            except LLMDeviceError as error:
                print(error, flush=True)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
    """
    assert "forked subprocess" in run(program)


def test_doctor_says_which() -> None:
    choice = probes.default_device()
    assert (choice.device, choice.problem) == ("npu:0", "")
    assert choice.reason == choose_device("auto", 0).reason

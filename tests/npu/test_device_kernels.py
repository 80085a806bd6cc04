# SPDX-License-Identifier: Apache-2.0
"""The copy ops on NPU memory against the slow models, and every way to call them wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_datadist_torch import LLMDeviceError, LLMOutOfMemoryError, LLMStatusCode, ops
from llm_datadist_torch.memory import device_copies
from tests import reference
from tests import simulator_faults as faults
from tests.test_ops import LAYOUT, Blocks, block_pairs

Place = Callable[[torch.Tensor], torch.Tensor]

PLACES: dict[str, Place] = {
    "npu": lambda whole: whole.to("npu:0"),
    "pinned": lambda whole: whole.pin_memory(),
    "pageable": lambda whole: whole,
}
# One list in device memory at least; else it is no business of these kernels.
PAIRS = [
    ("npu", "npu"),
    ("npu", "pinned"),
    ("npu", "pageable"),
    ("pinned", "npu"),
    ("pageable", "npu"),
]

some = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def on_npu(*arguments: int) -> Blocks:
    return Blocks(*arguments, place=PLACES["npu"])


@some
@given(st.data(), st.integers(1, 12), LAYOUT, st.integers(1, 3))
def test_copy_blocks_equals_the_model(data, blocks, layout, count) -> None:
    nbytes, gap, lead = layout
    src, dst = data.draw(block_pairs(blocks, blocks))
    tensors = [on_npu(blocks, nbytes, gap, seed, lead) for seed in range(count)]
    ops.copy_blocks([t.tensor for t in tensors], src, dst)
    for t in tensors:
        reference.copy_blocks(t.model, nbytes, src, dst)
        t.check()


@some
@given(st.data(), st.integers(30, 60), st.integers(1, 3))
def test_many_dense_blocks_equal_the_model(data, blocks, count) -> None:
    """From so many blocks on they are gathered and scattered, in chains and rings, too."""
    src, dst = data.draw(block_pairs(blocks, blocks))
    tensors = [on_npu(blocks, 96, 0, seed, 32) for seed in range(count)]
    ops.copy_blocks([t.tensor for t in tensors], src, dst)
    for t in tensors:
        reference.copy_blocks(t.model, 96, src, dst)
        t.check()


@some
@given(st.data(), st.integers(1, 40), st.integers(1, 9), LAYOUT, LAYOUT, st.sampled_from(PAIRS))
def test_swap_blocks_equals_the_model(data, blocks, others, layout, other_layout, pair) -> None:
    nbytes, gap, lead = layout
    _, other_gap, other_lead = other_layout
    src, dst = data.draw(block_pairs(others, blocks))
    to = [Blocks(blocks, nbytes, gap, seed, lead, PLACES[pair[0]]) for seed in range(2)]
    at = [
        Blocks(others, nbytes, other_gap, 9 + seed, other_lead, PLACES[pair[1]])
        for seed in range(2)
    ]
    ops.swap_blocks([t.tensor for t in to], [t.tensor for t in at], dst, src)
    for t, s in zip(to, at, strict=True):
        reference.swap_blocks(t.model, bytes(s.model), nbytes, dst, src)
        t.check()
        s.check()


@some
@given(st.data(), LAYOUT, LAYOUT, st.booleans(), st.sampled_from(PAIRS))
def test_copy_rows_equals_the_model(data, layout, other_layout, same, pair) -> None:
    to = Blocks(4, layout[0], layout[1], 1, layout[2], PLACES[pair[0]])
    same = same and pair[0] == "npu"
    other = Blocks(3, other_layout[0], other_layout[1], 2, other_layout[2], PLACES[pair[1]])
    at = to if same else other
    dst_row = data.draw(st.integers(0, 3))
    src_row = data.draw(st.integers(0, at.tensor.size(0) - 1))
    limit = min(to.tensor.size(1), at.tensor.size(1))
    offset = data.draw(st.integers(0, limit))
    nbytes = data.draw(st.integers(0, limit - offset))
    ops.copy_rows([to.tensor], [at.tensor], dst_row, src_row, offset, nbytes)
    strides = (to.tensor.size(1), at.tensor.size(1))
    reference.copy_rows(to.model, at.model, (dst_row, src_row), strides, (offset, nbytes))
    to.check()
    at.check()


@pytest.mark.parametrize("ring", [False, True])
def test_more_than_a_gather_may_take(ring: bool) -> None:
    """Above 32 MiB it goes in pieces, or, where blocks are both read and written, in order."""
    blocks, nbytes = 40, 1 << 20
    tensor = on_npu(2 * blocks, nbytes, 0, 1, 32)
    src = [*range(1, blocks), 0] if ring else list(range(0, 2 * blocks, 2))
    dst = list(range(blocks)) if ring else list(range(1, 2 * blocks, 2))
    ops.copy_blocks([tensor.tensor], src, dst)
    reference.copy_blocks(tensor.model, nbytes, src, dst)
    tensor.check()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.float16,
        torch.int16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_every_dtype_is_moved_bit_by_bit(dtype: torch.dtype) -> None:
    """NaNs and subnormal numbers keep their bits, whatever kernels move them."""
    limit = 2 if dtype == torch.bool else 256
    bits = torch.arange(64 * 64).reshape(64, 64).remainder(limit).to(torch.uint8)
    there = bits.view(dtype).npu()
    src, dst = list(range(0, 64, 2)), list(range(1, 64, 2))
    ops.copy_blocks([there], src, dst)
    bits[dst] = bits[src]
    assert torch.equal(there.cpu().view(torch.uint8), bits)
    other = torch.zeros_like(bits).view(dtype).npu()
    ops.swap_blocks([other], [there], src, dst)
    assert torch.equal(other.cpu().view(torch.uint8)[src], bits[dst])


def test_interleaved_views() -> None:
    kv = torch.arange(4 * 2 * 8, dtype=torch.float32).reshape(4, 2, 8)
    there = kv.npu()
    ops.copy_blocks([there[:, 0], there[:, 1]], [0], [3])
    kv[3] = kv[0]
    assert torch.equal(there.cpu(), kv)


def test_version_counter_and_autograd() -> None:
    tensor = torch.zeros(40, 4, device="npu:0", requires_grad=True)
    source = torch.arange(160.0).reshape(40, 4)
    ids = list(range(0, 40, 2))
    version = tensor._version
    ops.swap_blocks([tensor], [source.npu()], ids, ids)
    assert tensor._version > version
    assert tensor.is_leaf
    assert torch.equal(tensor.detach().cpu()[::2], source[::2])


def test_another_device_than_the_current_one(npu: Any) -> None:
    there = torch.arange(32).reshape(8, 4).to("npu:1")
    ops.copy_blocks([there], [0], [7])
    host = torch.zeros(8, 4, dtype=torch.int64)
    ops.swap_blocks([host], [there], [1], [7])
    assert host[1].tolist() == there.cpu()[7].tolist() == [0, 1, 2, 3]
    assert npu.current_device() == 0


def test_from_a_thread_that_has_no_device() -> None:
    tensors = [torch.arange(32).reshape(8, 4).to(f"npu:{index}") for index in (0, 1)]
    errors: list[Exception] = []

    def work() -> None:
        try:
            for tensor in tensors:
                ops.copy_blocks([tensor], [0], [7])
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    for tensor in tensors:
        assert tensor.cpu()[7].tolist() == [0, 1, 2, 3]


def test_two_devices_in_one_call_are_refused() -> None:
    one, other = torch.zeros(4, 2).npu(), torch.zeros(4, 2).to("npu:1")
    with pytest.raises(ValueError, match=r"tensors\[1\] is on npu:1, but tensors\[0\] on npu:0"):
        ops.copy_blocks([one, other], [0], [1])
    with pytest.raises(ValueError, match="dst is on npu:0, but src on npu:1: one call works on"):
        ops.swap_blocks([one], [other], [0], [1])
    with pytest.raises(ValueError, match="dst is on npu:1, but src on npu:0"):
        ops.copy_rows([other], [one], 0, 0, 0, 8)


@pytest.mark.parametrize(
    ("src", "dst", "error", "text"),
    [
        ([0, 4], [1, 2], IndexError, r"src_ids\[1\]=4 is out of range \[0, 4\)"),
        ([0], [-1], IndexError, r"dst_ids\[0\]=-1"),
        ([0, 1], [3, 3], ValueError, r"dst_ids\[1\]=3 repeats"),
        ([0, 1], [3], ValueError, "dst_ids has 1 ids, but src_ids 2"),
    ],
)
def test_bad_ids(src, dst, error, text) -> None:
    tensor = torch.arange(8).reshape(4, 2).npu()
    with pytest.raises(error, match=text):
        ops.copy_blocks([tensor], src, dst)
    with pytest.raises(error, match=text):
        ops.swap_blocks([tensor], [torch.zeros(4, 2, dtype=torch.int64)], dst, src)
    assert tensor.cpu().flatten().tolist() == list(range(8))


def test_nothing_to_do() -> None:
    tensor = torch.arange(8).reshape(4, 2).npu()
    ops.copy_blocks([tensor], [], [])
    ops.copy_blocks([tensor], [2], [2])
    ops.copy_rows([tensor], [tensor], 1, 1, 0, 16)
    ops.copy_blocks([torch.zeros(4, 0, device="npu:0")], [1], [2])
    assert tensor.cpu().flatten().tolist() == list(range(8))


@pytest.mark.parametrize("mode", ["0", "1", "2"])
def test_the_queue_of_torch_npu_is_flushed(mode: str) -> None:
    """In each of its modes, kernels come before or after a copy as they were launched."""
    code = """
        import torch
        from llm_datadist_torch.movement import ops
        tensor = torch.zeros(64, 256, device="npu:0")
        host = torch.zeros(64, 256).pin_memory()
        for step in range(1, 20):
            tensor.fill_(step)
            ops.copy_blocks([tensor], [0], [1], non_blocking=True)
            ops.swap_blocks([host], [tensor], [2], [1], non_blocking=step % 2 == 0)
            tensor.add_(100)
            torch.npu.synchronize()
            assert host[2].unique().tolist() == [step], (step, host[2].unique())
            assert tensor.cpu().unique().tolist() == [step + 100]
    """
    environment = os.environ | {"TASK_QUEUE_ENABLE": mode}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, timeout=100
    )


# -- with the simulator's help ---------------------------------------------------------------------


@contextmanager
def injected(function: str, code: int) -> Iterator[None]:
    """The next call of a function fails."""
    faults.fail(function, code=code)
    yield
    faults.reset()


@pytest.mark.needs_simulated_npu
@pytest.mark.parametrize("direction", ["in", "out"])
def test_one_batch_for_all_runs_of_all_tensors(direction: str) -> None:
    ids = list(range(0, 5000, 2))
    there = [torch.arange(10000).reshape(5000, 2).npu() for _ in range(2)]
    here = [torch.zeros(5000, 2, dtype=torch.int64).pin_memory() for _ in range(2)]
    names = ("aclrtMemcpyBatchAsync", "aclrtMemcpyAsync")
    before = [faults.count(name) for name in names]
    to, at = (there, here) if direction == "in" else (here, there)
    ops.swap_blocks(to, at, ids, ids)
    calls = [faults.count(name) - old for name, old in zip(names, before, strict=True)]
    assert calls == [2, 0]  # 5000 copies, at most 4096 in a batch
    for tensor, source in zip(to, at, strict=True):
        assert torch.equal(tensor.cpu()[::2], source.cpu()[::2])


@pytest.mark.needs_simulated_npu
@pytest.mark.parametrize("code", [207000, 107000])
def test_a_batch_that_the_runtime_refuses_goes_one_by_one(code: int) -> None:
    there = torch.arange(40).reshape(20, 2).npu()
    here = torch.zeros(20, 2, dtype=torch.int64).pin_memory()
    with injected("aclrtMemcpyBatchAsync", code):
        ops.swap_blocks([here], [there], [1, 3, 5], [2, 4, 7])
    assert torch.equal(here[[1, 3, 5]], there.cpu()[[2, 4, 7]])


@pytest.mark.needs_simulated_npu
@pytest.mark.parametrize(
    ("function", "code", "kind", "status"),
    [
        ("aclrtMemcpyAsync", 507899, LLMDeviceError, LLMStatusCode.LLM_FAILED),
        ("aclrtMemcpyAsync", 507053, LLMDeviceError, LLMStatusCode.LLM_DEVICE_MEM_ERROR),
        ("aclrtMemcpyAsync", 207001, LLMOutOfMemoryError, LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY),
        ("aclrtSynchronizeStream", 507057, LLMDeviceError, LLMStatusCode.LLM_SUSPECT_REMOTE_ERROR),
    ],
)
def test_errors_of_the_runtime_are_typed(function, code, kind, status) -> None:
    tensor = torch.arange(8).reshape(4, 2).npu()
    torch.npu.synchronize()
    with (
        injected(function, code),
        pytest.raises(kind, match=f"{function} failed with code {code}") as caught,
    ):
        ops.copy_blocks([tensor], [0], [3])
    assert caught.value.status_code == status
    assert caught.value.op == function
    ops.copy_blocks([tensor], [0], [3])  # the device works again
    assert tensor.cpu()[3].tolist() == [0, 1]


@pytest.mark.needs_simulated_npu
def test_a_wild_address_is_an_error() -> None:
    tensor = torch.zeros(1024, dtype=torch.uint8).npu()
    addresses = torch.tensor([tensor.data_ptr()]), torch.tensor([tensor.data_ptr() + (1 << 36)])
    with pytest.raises(LLMDeviceError):
        device_copies.copy_runs(
            *addresses, torch.tensor([[0, 0, 1024]]), tensor.device, tensor.device
        )

# SPDX-License-Identifier: Apache-2.0
"""What else programs may rely on in the simulator's kernels: errors, random numbers, modes."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_sim import faults

DEVICE = "npu:0"


def matrix() -> torch.Tensor:
    return torch.arange(24.0, device=DEVICE).reshape(4, 6)


def works() -> None:
    """The device goes on after an error."""
    assert (matrix() + 1).sum().item() == 300


def check_index_out_of_range_is_reported_when_somebody_waits():
    far = torch.tensor([9], device=DEVICE)
    launches = {
        "aclnnIndex": lambda: matrix()[far],
        "aclnnIndexSelect": lambda: matrix().index_select(0, far),
        "aclnnEmbedding": lambda: functional.embedding(far, matrix()),
        "aclnnGather": lambda: matrix().gather(0, far[None]),
        "aclnnIndexPutImpl": lambda: matrix().index_put_((far,), matrix()[:1].clone()),
    }
    for name, launch in launches.items():
        launch()
        with pytest.raises(RuntimeError, match=rf"{name} failed in stream[\s\S]*out of"):
            torch.npu.synchronize()
        works()


def check_a_copy_to_the_host_reports_it_too():
    wrong = matrix().index_select(0, torch.tensor([9], device=DEVICE))
    with pytest.raises(RuntimeError, match="507015"):
        wrong.cpu()
    works()


def check_shapes_that_do_not_fit():
    matrix() @ matrix()
    with pytest.raises(RuntimeError, match=r"aclnnMatmul failed[\s\S]*4x6 and 4x6"):
        torch.npu.synchronize()
    works()


def check_an_operator_without_a_kernel_is_named():
    with pytest.raises(RuntimeError, match="no kernel for aten::upsample_nearest1d"):
        functional.interpolate(matrix()[None], 2)
    with pytest.raises(RuntimeError, match="no kernel for aten::renorm"):
        matrix().renorm(2, 0, 1)
    works()


def check_a_task_made_to_fail():
    faults.fail("task.aclnnMul", code=507035)
    matrix().mul(matrix())
    with pytest.raises(RuntimeError, match="507035"):
        torch.npu.synchronize()
    faults.reset()
    works()


def check_a_kernel_runs_when_the_stream_gets_there():
    x = matrix()
    torch.npu.synchronize()
    launched, run = faults.count("aclnnMul"), faults.count("task.aclnnMul")
    y = x.mul(x)
    while faults.count("aclnnMul") == launched:  # torch_npu launches on a thread of its own
        time.sleep(0.001)
    if os.environ["ASCEND_SIM_SCHEDULER"] == "lazy":
        assert faults.count("task.aclnnMul") == run
    torch.npu.synchronize()
    assert faults.count("task.aclnnMul") == run + 1
    assert torch.equal(y.cpu(), x.cpu() * x.cpu())


def check_a_type_that_is_not_simulated():
    with pytest.raises(RuntimeError, match="no data type"):
        matrix().to(torch.float8_e4m3fn)


def check_random_numbers_repeat_with_the_seed():
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return [
            torch.rand(9, device=DEVICE),
            torch.rand(9, device=DEVICE),
            torch.randn(9, device=DEVICE, dtype=torch.float16),
            torch.randint(0, 100, (9,), device=DEVICE),
            torch.randperm(9, device=DEVICE),
        ]

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def check_random_numbers_are_distributed():
    torch.manual_seed(3)
    n = 4000
    empty = torch.empty(n, device=DEVICE)
    uniform = torch.rand(n, device=DEVICE)
    assert uniform.min().item() >= 0
    assert uniform.max().item() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.05
    assert abs(empty.uniform_(2, 4).mean().item() - 3) < 0.05
    normal = torch.randn(n, device=DEVICE)
    assert abs(normal.mean().item()) < 0.1
    assert abs(normal.std().item() - 1) < 0.1
    assert abs(empty.normal_(2, 3).std().item() - 3) < 0.3
    assert abs(empty.bernoulli_(0.3).mean().item() - 0.3) < 0.05
    assert abs(empty.exponential_(2.0).mean().item() - 0.5) < 0.05
    integers = torch.randint(3, 9, (n,), device=DEVICE)
    assert integers.unique().tolist() == [3, 4, 5, 6, 7, 8]
    assert torch.equal(torch.randperm(50, device=DEVICE).sort().values.cpu(), torch.arange(50))
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0], device=DEVICE)
    drawn = torch.multinomial(weights, n, replacement=True)
    assert drawn.unique().tolist() == [1, 3]
    assert 0.7 < (drawn == 1).float().mean().item() < 0.8
    mean = torch.tensor([1.0, 5.0], device=DEVICE)
    assert torch.equal(torch.normal(mean, torch.zeros_like(mean)), mean)


def check_dropout():
    torch.manual_seed(3)
    dropped = functional.dropout(torch.ones(4000, device=DEVICE), 0.25)
    assert torch.allclose(dropped.unique().cpu(), torch.tensor([0, 4 / 3]))
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.05


class Recorder(TorchDispatchMode):
    """Notes the devices of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.devices.add(result.device.type)
        return result


def check_modes_of_the_waiting_thread_stay_out_of_kernels():
    x = matrix()
    with Recorder() as recorder, torch.autocast("cpu", torch.bfloat16):
        y = x @ x.T + 1
        torch.npu.synchronize()
    assert recorder.devices == {"npu"}
    assert torch.equal(y.cpu(), x.cpu() @ x.cpu().T + 1)


def check_gradients():
    x = matrix().requires_grad_()
    ((x * x).sum() + (x @ x.T).sum()).backward()
    y = x.detach().cpu().requires_grad_()
    ((y * y).sum() + (y @ y.T).sum()).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad.cpu(), y.grad)


def check_threads():
    sums: dict[int, float] = {}

    def work(number: int) -> None:
        torch.npu.set_device(DEVICE)
        with torch.npu.stream(torch.npu.Stream()):
            x = torch.full((8, 8), float(number), device=DEVICE)
            for _ in range(20):
                x = x + 1
            sums[number] = x.sum().item()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {number: 64.0 * (number + 20) for number in range(6)}


def check_a_second_device():
    x = matrix().to("npu:1")
    assert x.device.index == 1
    assert (x * 2).sum().item() == 552

# SPDX-License-Identifier: Apache-2.0
"""Addresses of NPU memory: what is taken, what is refused, and tensors over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_datadist_torch import CacheDesc, DataType, LLMParamError, Placement
from llm_datadist_torch.memory.address import check_alive, probe, tensor_over, tensors_over

DESC = CacheDesc(2, [4, 64], DataType.DT_FLOAT16)  # 512 bytes a tensor


def ours(device: torch.device, count: int = 2) -> list[torch.Tensor]:
    return [
        torch.arange(256.0, device=device).view(4, 64).to(torch.float16) + at for at in range(count)
    ]


def test_tensors_over_addresses(device: torch.device) -> None:
    owners = ours(device, 3)
    tensors = tensors_over([each.data_ptr() for each in owners], (4, 64), torch.float16, device)
    for tensor, owner in zip(tensors, owners, strict=True):
        assert (tensor.device, tensor.shape, tensor.dtype) == (device, owner.shape, owner.dtype)
        assert tensor.data_ptr() == owner.data_ptr()
        assert torch.equal(tensor.cpu(), owner.cpu())
    tensors[1][2:] = 5
    expected = torch.arange(256.0).view(4, 64) + 1
    expected[2:] = 5
    assert torch.equal(owners[1].cpu(), expected.half())


def test_every_kind_of_operator_on_tensors_over_addresses(device: torch.device) -> None:
    owner = torch.arange(24.0, device=device)
    tensor = tensor_over(owner.data_ptr(), (6, 4), torch.float32, device)
    data = torch.arange(24.0).view(6, 4)
    ids = torch.tensor([5, 0], device=device)
    assert torch.equal(tensor[ids].cpu(), data[[5, 0]])
    tensor[ids] = tensor[1:3].clone()
    data[[5, 0]] = data[1:3].clone()
    assert torch.equal(tensor.cpu(), data)
    assert torch.equal(torch.cat([tensor, tensor], 1).cpu(), torch.cat([data, data], 1))
    assert torch.equal(tensor.t().contiguous().cpu(), data.t())
    assert torch.equal((tensor * 2).sum(0).cpu(), (data * 2).sum(0))
    assert torch.equal(tensor.view(-1)[3:9].cpu(), data.view(-1)[3:9])
    assert tensor.clone().cpu().equal(data)
    tensor.zero_()
    assert not owner.any().item()
    assert tensor.untyped_storage().nbytes() == 96


def test_one_element_and_odd_shapes(device: torch.device) -> None:
    owner = torch.arange(7, dtype=torch.int64, device=device)
    (one,) = tensors_over([owner.data_ptr() + 16], (1,), torch.int64, device)
    assert one.item() == 2
    (scalar,) = tensors_over([owner.data_ptr() + 24], (), torch.int64, device)
    assert scalar.item() == 3
    (cube,) = tensors_over([owner.data_ptr()], (1, 7, 1), torch.int64, device)
    assert cube.cpu().flatten().tolist() == list(range(7))


def on_npu_1() -> torch.Tensor:
    return torch.empty(4096, dtype=torch.uint8, device="npu:1")


def test_a_device_needs_an_index(device: torch.device) -> None:
    owner = torch.zeros(4, device=device)
    with pytest.raises(LLMParamError, match=r'device=npu has no index.*"npu:0"'):
        tensors_over([owner.data_ptr()], (4,), torch.float32, torch.device("npu"))


def freed(device: torch.device) -> int:
    tensor = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    return tensor.data_ptr()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("null", "null address"),
        ("host", "not device memory"),
        ("freed", "freed it"),
        ("returned", "not device memory"),
        pytest.param(
            "other device", "memory of npu:1, not of npu:0", marks=pytest.mark.needs_two_npus
        ),
        ("too short", "its tensor ends 512 bytes behind it"),
        ("nothing", "not device memory"),
    ],
)
def test_what_is_not_memory_of_this_npu(
    device: torch.device, npu: Any, kind: str, reason: str
) -> None:
    keep = torch.empty(4096, dtype=torch.uint8)
    good = torch.empty(1024, dtype=torch.uint8, device=device)
    address = {
        "null": lambda: 0,
        "host": keep.data_ptr,
        "freed": lambda: freed(device),
        "returned": lambda: freed(device),
        "other device": lambda: on_npu_1().data_ptr(),
        "too short": lambda: good.data_ptr() + 512,
        "nothing": lambda: 1 << 62,
    }[kind]()
    if kind == "returned":
        npu.empty_cache()
    with pytest.raises(LLMParamError, match=rf"addrs\[1\].*{reason}"):
        probe([good.data_ptr(), address], 1024, device)
    with pytest.raises(LLMParamError, match=r"addrs\[0\]"):
        tensors_over([address], (1024,), torch.uint8, device)


def test_a_range_that_runs_over_the_end_of_the_memory(device: torch.device) -> None:
    good = torch.empty(32 << 20, dtype=torch.uint8, device=device)
    probe([good.data_ptr()], good.nbytes, device)
    probe([good.data_ptr() + good.nbytes - 1], 1, device)
    with pytest.raises(LLMParamError, match=r"its tensor ends|not device memory from byte"):
        probe([good.data_ptr()], 1 << 40, device)
    with pytest.raises(ValueError, match="positive"):
        probe([good.data_ptr()], 0, device)
    with pytest.raises(ValueError, match="no address"):
        probe([1 << 64], 1, device)


def test_alive_is_what_the_runtime_still_has(device: torch.device, npu: Any) -> None:
    tensor = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    address = tensor.data_ptr()
    check_alive([address, address + 4096], 4096, device)
    del tensor
    npu.empty_cache()
    keep = torch.empty(4096, dtype=torch.uint8, device=device)
    with pytest.raises(LLMParamError, match=r"addrs\[1\].*not device memory"):
        check_alive([keep.data_ptr(), address], 4096, device)


def test_device_memory_is_no_host_memory(device: torch.device) -> None:
    tensor = torch.empty(4096, dtype=torch.uint8, device=device)
    with pytest.raises(LLMParamError):
        probe([tensor.data_ptr()], 4096)


# -- registered caches ----------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("as_ints", [False, True])
def test_registered_caches(
    instance_factory, device: torch.device, paged: bool, as_ints: bool
) -> None:
    manager = instance_factory().cache_manager
    owners = ours(device)
    given = [each.data_ptr() for each in owners] if as_ints else owners
    register = manager.register_blocks_cache if paged else manager.register_cache
    cache = register(DESC, given)
    assert cache.device == device
    assert cache.is_unowned is as_ints
    assert cache.tensor_addrs == [each.data_ptr() for each in owners]
    cache.tensors[1][3] = 7
    assert owners[1][3].cpu().unique().tolist() == [7]
    manager.unregister_cache(cache.cache_id)
    assert cache.ended


def test_registered_tensors_are_kept_alive(instance_factory, device: torch.device) -> None:
    manager = instance_factory().cache_manager
    cache = manager.register_blocks_cache(DESC, ours(device))
    noise = [torch.zeros(4, 64, dtype=torch.float16, device=device) for _ in range(8)]
    assert torch.equal(cache.tensors[1].cpu(), (torch.arange(256.0).view(4, 64) + 1).half())
    del noise


@pytest.mark.needs_two_npus
def test_what_register_refuses(instance_factory, device: torch.device) -> None:
    manager = instance_factory().cache_manager
    on_host = [torch.zeros(4, 64, dtype=torch.float16) for _ in range(2)]
    elsewhere = ours(torch.device("npu:1"))
    for given in (on_host, elsewhere):
        with pytest.raises(LLMParamError, match=r"tensors\[0\] is on .*, the cache is on npu:0"):
            manager.register_blocks_cache(DESC, given)
        with pytest.raises(LLMParamError, match=r"addrs\[0\]"):
            manager.register_blocks_cache(DESC, [each.data_ptr() for each in given])
    host_desc = CacheDesc(2, [4, 64], DataType.DT_FLOAT16, Placement.HOST)
    with pytest.raises(LLMParamError, match="is on npu:0, the cache is on cpu"):
        manager.register_blocks_cache(host_desc, ours(device))
    here = ours(device)
    with pytest.raises(LLMParamError, match=r"addrs\[0\]"):
        manager.register_blocks_cache(host_desc, [each.data_ptr() for each in here])
    with pytest.raises(LLMParamError, match="overlap"):
        manager.register_blocks_cache(DESC, [here[0].data_ptr(), here[0].data_ptr() + 256])
    assert manager.register_blocks_cache(DESC, here).device == device

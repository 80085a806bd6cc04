# SPDX-License-Identifier: Apache-2.0
"""Which device an instance takes, and for which products the library is."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from llm_datadist_torch.memory import device as device_module
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.memory.device import HostDevice, NpuDevice, choose_device
from llm_datadist_torch.memory.products import Support, product_of
from llm_datadist_torch.values.config import PoolConfig
from llm_datadist_torch.values.status import (
    LLMDeviceError,
    LLMFeatureNotEnabledError,
    LLMParamError,
)


@pytest.fixture
def fake_npu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch_npu that sees two NPUs of a supported product; to be changed by tests."""
    npu = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        init=lambda: None,
        get_device_name=lambda _: "Ascend910B4",
    )
    module = ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    module.npu = npu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(device_module, "_warned_chips", set())
    # torch knows the name "npu" only once the real torch_npu has been imported.
    monkeypatch.setattr(device_module, "NPU", "privateuseone")
    return npu


@pytest.fixture
def no_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str) -> object:
        return None if name == "torch_npu" else find(name)

    monkeypatch.setattr("importlib.util.find_spec", without)


@pytest.mark.usefixtures("no_torch_npu")
def test_without_torch_npu() -> None:
    assert choose_device("auto", 7).device == torch.device("cpu")
    assert "torch_npu is not installed" in choose_device("auto", 0).reason
    with pytest.raises(LLMFeatureNotEnabledError, match="torch_npu is not installed") as caught:
        choose_device("npu", 0)
    assert 'LLMConfig.device = "cpu"' in str(caught.value.remedy)


@pytest.mark.usefixtures("fake_npu")
def test_a_torch_npu_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(device_module, "torch_npu", broken)
    assert "libhccl.so" in choose_device("auto", 0).reason
    with pytest.raises(LLMFeatureNotEnabledError, match=r"libhccl\.so.*set_env\.sh"):
        choose_device("npu", 0)


def test_a_torch_npu_without_npus(fake_npu: SimpleNamespace) -> None:
    fake_npu.is_available = lambda: False
    assert isinstance(choose_device("auto", 0), HostDevice)
    with pytest.raises(LLMFeatureNotEnabledError, match=r"sees no NPU.*npu-smi"):
        choose_device("npu", 0)


@pytest.mark.usefixtures("fake_npu")
@pytest.mark.parametrize("wanted", ["auto", "npu"])
def test_an_npu(wanted: str) -> None:
    chosen = choose_device(wanted, 1)
    assert isinstance(chosen, NpuDevice)
    assert chosen.device.index == 1
    assert "Ascend910B4" in chosen.reason
    with pytest.raises(LLMParamError, match=r"device_id=2 is out of range.*2 NPU.*below 2"):
        choose_device(wanted, 2)


@pytest.mark.usefixtures("fake_npu")
def test_the_cpu_is_taken_where_it_is_wanted() -> None:
    chosen = choose_device("cpu", 99)
    assert isinstance(chosen, HostDevice)
    assert chosen.device == torch.device("cpu")


def test_an_npu_that_does_not_answer(fake_npu: SimpleNamespace) -> None:
    def broken(_: int) -> str:
        raise RuntimeError("error code 507899")

    fake_npu.get_device_name = broken
    with pytest.raises(LLMDeviceError, match="507899"):
        choose_device("auto", 0)


@pytest.mark.parametrize("chip", ["Ascend310P3", "Ascend310B1", "Ascend910A", "Ascend910ProB"])
def test_products_that_are_refused(fake_npu: SimpleNamespace, chip: str) -> None:
    fake_npu.get_device_name = lambda _: chip
    for wanted in ("auto", "npu"):
        with pytest.raises(LLMFeatureNotEnabledError, match=f"{chip} .*not supported.*A3"):
            choose_device(wanted, 0)
    assert isinstance(choose_device("cpu", 0), HostDevice)


def test_products_that_are_not_known_are_warned_of_once(
    fake_npu: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    fake_npu.get_device_name = lambda index: ("Ascend910B1", "Ascend990")[index]
    with caplog.at_level(logging.WARNING, "llm_datadist_torch"):
        for index in (0, 1, 0, 1):
            choose_device("auto", index)
    assert [record.args[0] for record in caplog.records] == ["Ascend910B1", "Ascend990"]


@pytest.mark.parametrize(
    ("chip", "support", "name"),
    [
        ("Ascend910_9391", Support.FULL, "Atlas A3"),
        ("Ascend910_9362", Support.FULL, "Atlas A3"),
        ("Ascend910B4", Support.FULL, "Atlas A2 inference"),
        ("Ascend910B4-1", Support.FULL, "Atlas A2 inference"),
        ("Ascend910B1", Support.WARN, "Atlas A2 training or inference"),
        ("Ascend910B2C", Support.WARN, "Atlas A2 training or inference"),
        ("Ascend910B3", Support.WARN, "Atlas A2 training or inference"),
        ("Ascend910A", Support.NONE, "Atlas training series"),
        ("Ascend910B", Support.NONE, "Atlas training series"),
        ("Ascend910PremiumA", Support.NONE, "Atlas training series"),
        ("Ascend310P3", Support.NONE, "Atlas inference series"),
        ("Ascend310B4", Support.NONE, "Atlas 200I/500 A2"),
        ("Ascend310", Support.NONE, "Atlas 200/300/500 series"),
        ("Ascend950PR_9579", Support.FULL, "Atlas A5"),
        ("Ascend910_9579", Support.FULL, "Atlas A5"),
        ("Ascend990", Support.WARN, "an unknown product"),
        ("", Support.WARN, "an unknown product"),
    ],
)
def test_products(chip: str, support: Support, name: str) -> None:
    product = product_of(chip)
    assert (product.support, product.name) == (support, name)


def test_the_cpu_pools() -> None:
    host = HostDevice("")
    assert isinstance(host.memory(PoolConfig(1 << 20)), ArenaMemory)
    assert isinstance(host.host_memory(PoolConfig(1 << 20)), ArenaMemory)

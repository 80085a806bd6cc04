# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` says of NPUs, told by the real torch_npu."""

from __future__ import annotations

import pytest

from llm_datadist_torch.cli import probes

pytestmark = pytest.mark.needs_simulated_npu

ON, OFF = "expandable_segments:True", "expandable_segments:False"


@pytest.mark.parametrize(
    ("settings", "expandable"),
    [({"PYTORCH_NPU_ALLOC_CONF": OFF}, False), ({"PYTORCH_ALLOC_CONF": ON}, True)],
)
def test_which_segments_torch_npu_makes(monkeypatch, settings: dict[str, str], expandable: bool):
    for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, text in settings.items():
        monkeypatch.setenv(name, text)
    view = probes.npus()
    assert (view.problem, view.allocator_problem) == ("", "")
    assert view.expandable is expandable
    assert view.devices
    assert all(npu.chip.startswith("Ascend") and npu.total_bytes > 0 for npu in view.devices)


def test_settings_that_torch_npu_refuses(monkeypatch):
    """Its own words are reported, not the line with a code that it puts behind them."""
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", OFF)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", OFF)
    view = probes.npus()
    assert "please set only one of them" in view.problem
    assert view.devices == ()

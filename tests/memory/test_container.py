# SPDX-License-Identifier: Apache-2.0
"""The memory limit of a container counts as what can be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_datadist_torch import LLMOutOfMemoryError
from llm_datadist_torch.memory import container
from llm_datadist_torch.memory.allocate import HostMemory
from llm_datadist_torch.memory.container import container_limit

GIB = 1 << 30


class Groups:
    """Control groups as the kernel shows them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
        self._root = folder / "fs"
        own = folder / "cgroup"
        own.write_text(f"{line}\n")
        monkeypatch.setattr(container, "_ROOT", self._root)
        monkeypatch.setattr(container, "_CGROUPS", own)

    def write(self, name: str, value: object) -> None:
        file = self._root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")


def test_version_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = Groups(tmp_path, monkeypatch, "0::/pod/box")
    assert container_limit(GIB) is None
    groups.write("pod/box/memory.max", "max")
    groups.write("pod/box/memory.swap.max", "max")
    assert container_limit(GIB) is None
    groups.write("pod/memory.max", 4 * GIB)
    assert container_limit(GIB) == 5 * GIB
    groups.write("pod/box/memory.max", 2 * GIB)
    groups.write("pod/box/memory.swap.max", 0)
    assert container_limit(GIB) == 2 * GIB


def test_a_container_sees_its_group_as_the_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups = Groups(tmp_path, monkeypatch, "0::/not/mounted/here")
    groups.write("memory.max", 3 * GIB)
    assert container_limit(0) == 3 * GIB


def test_version_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = Groups(tmp_path, monkeypatch, "7:cpu,memory:/box")
    groups.write("memory/memory.limit_in_bytes", 9223372036854771712)
    assert container_limit(GIB) is None
    groups.write("memory/box/memory.limit_in_bytes", 2 * GIB)
    assert container_limit(GIB) == 3 * GIB
    groups.write("memory/box/memory.memsw.limit_in_bytes", 2 * GIB)
    assert container_limit(GIB) == 2 * GIB


def test_more_than_the_container_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = Groups(tmp_path, monkeypatch, "0::/")
    groups.write("memory.max", 128 << 20)
    groups.write("memory.swap.max", 0)
    with pytest.raises(LLMOutOfMemoryError, match=f"this container .* may have {128 << 20}"):
        HostMemory().allocate(1, (200 << 20,), torch.uint8)

# SPDX-License-Identifier: Apache-2.0
"""How much memory the container of this process may have: the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_V1_NONE = 1 << 62
"""Version 1 writes the largest number of pages where there is no limit."""


def container_limit(swap_bytes: int) -> int | None:
    """Bytes of memory and swap that the container may have; None without a limit.

    The smallest limit of the process's control group and those around it, of either version.

    Args:
        swap_bytes: Swap of the machine, all of which a group may use that has no limit of swap.
    """
    limits = [_limit(folder, swap_bytes, v2=v2) for folder, v2 in _folders()]
    return min((limit for limit in limits if limit is not None), default=None)


def _folders() -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that limit this process's memory, and whether of version 2."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _ROOT / "memory" if controllers else _ROOT
        # Inside a container the path may be that of the host, whose folders are not there; what is
        # mounted as the root is the container's own group then.
        group = PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents):
            yield root / part, not controllers


def _limit(folder: Path, swap_bytes: int, *, v2: bool) -> int | None:
    memory = _number(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
    if memory is None or memory >= _V1_NONE:
        return None
    if v2:
        swap = _number(folder / "memory.swap.max")
        return memory + (swap_bytes if swap is None else min(swap, swap_bytes))
    together = _number(folder / "memory.memsw.limit_in_bytes")
    return memory + swap_bytes if together is None else min(together, memory + swap_bytes)


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", or where it can't be read."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

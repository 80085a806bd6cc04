# SPDX-License-Identifier: Apache-2.0
"""move_mapped: one call checks the counters, finds the addresses, copies, checks again."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from llm_datadist_torch import _C

DONE, LATE, STALE, OUTSIDE = range(4)
OWNER_BASE = 0x7000_0000_0000
"""Where the region starts in the owner's process."""
LOOKUP, MEMORY = 5, 9
FOR_EVER = 0


class Region:
    """Memory that is "mapped" here, and a tensor of ours."""

    def __init__(self, nbytes: int = 4096) -> None:
        self.mapped = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
        self.ours = torch.zeros(nbytes, dtype=torch.uint8)
        self.counters = torch.tensor([LOOKUP, MEMORY], dtype=torch.int64)

    def move(self, *, write=False, at=0, deadline=FOR_EVER, checked=True, leased=False, runs=None):
        """Runs of (ours, theirs, nbytes) for one tensor that starts ``at`` bytes in the region."""
        version = (self.counters.data_ptr(), leased, LOOKUP, MEMORY) if checked else ()
        return _C.move_mapped(
            write,
            torch.tensor([self.ours.data_ptr()]),
            torch.tensor([OWNER_BASE + at]),
            torch.tensor([[16, 64, 8], [0, 256, 4]] if runs is None else runs),
            OWNER_BASE,
            self.mapped.data_ptr(),
            self.mapped.numel(),
            deadline,
            *version,
        )


@pytest.mark.parametrize("checked", [True, False])
def test_read(checked):
    region = Region()
    assert region.move(at=128, checked=checked) == DONE
    expected = torch.zeros_like(region.ours)
    expected[16:24] = region.mapped[128 + 64 : 128 + 72]
    expected[:4] = region.mapped[128 + 256 : 128 + 260]
    assert torch.equal(region.ours, expected)


def test_write():
    region = Region()
    region.ours.fill_(7)
    expected = region.mapped.clone()
    expected[64:72] = expected[256:260] = 7
    assert region.move(write=True) == DONE
    assert torch.equal(region.mapped, expected)


@pytest.mark.parametrize(
    ("at", "runs"),
    [
        (0, [[0, 4090, 7]]),
        (4090, [[0, 0, 7]]),
        (-1, [[0, 0, 1]]),
        (1 << 40, [[0, 0, 1]]),
        (0, [[0, 2**62, 1]]),
    ],
)
@pytest.mark.parametrize("write", [True, False])
def test_a_tensor_that_leaves_the_region(at, runs, write):
    region = Region()
    before = region.mapped.clone()
    assert region.move(at=at, runs=runs, write=write) == OUTSIDE
    assert not region.ours.any()
    assert torch.equal(region.mapped, before)


def test_a_key_that_leads_elsewhere():
    region = Region()
    region.counters[0] += 1
    assert region.move() == STALE
    assert not region.ours.any()
    # A lease keeps the cache, whatever becomes of its keys.
    assert region.move(leased=True) == DONE


@pytest.mark.parametrize("leased", [True, False])
def test_memory_that_was_freed(leased):
    region = Region()
    region.counters[1] += 1
    assert region.move(leased=leased) == STALE


@pytest.mark.parametrize("leased", [True, False])
def test_memory_that_is_freed_while_it_is_read(leased):
    nbytes = 256 << 20
    region = Region(nbytes)
    result: list[int] = []
    thread = threading.Thread(
        target=lambda: result.append(region.move(runs=[[0, 0, nbytes]], leased=leased))
    )
    # The first bytes that arrive show that the copy has begun, and it takes far longer than this.
    region.mapped.fill_(1)
    thread.start()
    while not region.ours[0] and not region.ours[-1] and thread.is_alive():
        time.sleep(0)
    region.counters[1] += 1
    thread.join()
    assert result == [STALE]


def test_the_deadline():
    region = Region(64 << 20)
    assert region.move(runs=[[0, 0, 64 << 20]], deadline=1) == LATE
    assert region.move(runs=[[0, 0, 64 << 20]], deadline=time.monotonic_ns() + 60 * 10**9) == DONE


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([[0, 0, -1]], "negative"),
        ([[-1, 0, 1]], "negative"),
        ([[0, -1, 1]], "negative"),
        ([[0, 0]], "3 columns"),
        ([[0, 0, 2**62]] * 2, "exceed"),
    ],
)
def test_what_is_no_list_of_runs(runs, text):
    with pytest.raises(ValueError, match=text):
        Region().move(runs=runs)


def test_counters_that_are_none():
    region = Region()
    with pytest.raises(ValueError, match="not that of a 64-bit word"):
        _C.move_mapped(
            False,
            *(torch.tensor([region.ours.data_ptr()]), torch.tensor([OWNER_BASE])),
            *(torch.zeros((1, 3), dtype=torch.int64), OWNER_BASE, region.mapped.data_ptr(), 4096),
            *(FOR_EVER, 3, False, 0, 0),
        )

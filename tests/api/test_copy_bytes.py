# SPDX-License-Identifier: Apache-2.0
"""Local copies against the slow model, with canaries around every row and block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist_torch import Cache, CacheDesc, DataType, LLMDataDist, LLMRole, Placement
from tests import reference
from tests.api.support import PI, ids, raises, raw, scramble
from tests.conftest import make_options
from tests.devices import device_of, examples

CANARY = 0xA5


@pytest.fixture(scope="module")
def manager():
    datadist = LLMDataDist(LLMRole.MIX, 77)
    datadist.init(make_options(listen=None))
    yield datadist.cache_manager
    datadist.finalize()


class Guarded:
    """A registered cache in memory of canaries, and the model of its rows."""

    def __init__(self, make, rows: int, row_bytes: int, gap: int, count: int, seed: int, place):
        self.row_stride_bytes = row_bytes + gap
        lead = 64
        self.wholes = [
            torch.full(
                (2 * lead + rows * self.row_stride_bytes,),
                CANARY,
                dtype=torch.uint8,
                device=device_of(place),
            )
            for _ in range(count)
        ]
        views = [
            w.as_strided((rows, row_bytes), (self.row_stride_bytes, 1), lead) for w in self.wholes
        ]
        scramble(views, seed)
        self.cache = make(CacheDesc(count, [rows, row_bytes], DataType.DT_UINT8, place), views)
        self.models = [bytearray(raw(view)) for view in views]
        self.views = views

    def check(self) -> None:
        for whole, view, model in zip(self.wholes, self.views, self.models, strict=True):
            assert raw(view) == bytes(model)
            outside = torch.ones(whole.shape, dtype=torch.bool)
            outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            assert bool((whole.cpu()[outside] == CANARY).all()), "wrote outside the rows"


ROWS = st.integers(1, 9)
NBYTES = st.integers(1, 300)
GAP = st.sampled_from([0, 1, 7, 64])
COUNT = st.integers(1, 4)
GENTLE = settings(deadline=None, max_examples=examples(100))


def pairs_of(data: st.DataObject, sources: int, targets: int) -> list[tuple[int, int]]:
    dst = data.draw(st.lists(st.integers(0, targets - 1), unique=True, max_size=targets))
    return [(data.draw(st.integers(0, sources - 1)), d) for d in dst]


@GENTLE
@given(st.data(), ROWS, NBYTES, GAP, COUNT, st.booleans())
def test_copy_blocks_equals_the_model(manager, data, rows, nbytes, gap, count, as_tensor):
    guarded = Guarded(manager.register_blocks_cache, rows, nbytes, gap, count, 1, Placement.DEVICE)
    pairs = pairs_of(data, rows, rows)
    if as_tensor:
        info = ids(*pairs)
    else:
        info = {}
        for src, dst in pairs:
            info.setdefault(src, []).append(dst)
    manager.copy_blocks(guarded.cache, info)
    for model in guarded.models:
        reference.copy_blocks(model, nbytes, [p[0] for p in pairs], [p[1] for p in pairs])
    guarded.check()
    manager.unregister_cache(guarded.cache.cache_id)


@GENTLE
@given(st.data(), ROWS, ROWS, NBYTES, GAP, GAP, COUNT, st.booleans(), st.booleans())
def test_swap_blocks_equals_the_model(
    manager, data, src_rows, dst_rows, nbytes, src_gap, dst_gap, count, swap_in, as_tensor
):
    device, away = manager.register_blocks_cache, Cache.create_cpu_cache
    places = [Placement.HOST, Placement.DEVICE] if swap_in else [Placement.DEVICE, Placement.HOST]
    makers = [away, device] if swap_in else [device, away]
    src = Guarded(makers[0], src_rows, nbytes, src_gap, count, 1, places[0])
    dst = Guarded(makers[1], dst_rows, nbytes, dst_gap, count, 2, places[1])
    pairs = pairs_of(data, src_rows, dst_rows)
    if not as_tensor:  # a dict names each source once
        pairs = list(dict(pairs).items())
    manager.swap_blocks(src.cache, dst.cache, ids(*pairs) if as_tensor else dict(pairs))
    for to, at in zip(dst.models, src.models, strict=True):
        reference.swap_blocks(to, at, nbytes, [p[1] for p in pairs], [p[0] for p in pairs])
    src.check()
    dst.check()


@GENTLE
@given(st.data(), ROWS, ROWS, NBYTES, NBYTES, GAP, GAP, COUNT)
def test_copy_cache_equals_the_model(
    manager, data, src_rows, dst_rows, src_bytes, dst_bytes, src_gap, dst_gap, count
):
    make = manager.register_cache
    src = Guarded(make, src_rows, src_bytes, src_gap, count, 1, Placement.HOST)
    dst = Guarded(make, dst_rows, dst_bytes, dst_gap, count, 2, Placement.DEVICE)
    rows = data.draw(st.integers(0, dst_rows - 1)), data.draw(st.integers(0, src_rows - 1))
    offset = data.draw(st.integers(0, src_bytes + 1))
    size = data.draw(st.one_of(st.just(-1), st.integers(1, src_bytes + 1)))
    nbytes = src_bytes - offset if size == -1 else size
    if offset >= min(src_bytes, dst_bytes) or offset + nbytes > min(src_bytes, dst_bytes):
        with raises(PI):
            manager.copy_cache(dst.cache, src.cache, *rows, offset, size)
    else:
        manager.copy_cache(dst.cache, src.cache, *rows, offset, size)
        for to, at in zip(dst.models, src.models, strict=True):
            reference.copy_rows(to, at, rows, (dst_bytes, src_bytes), (offset, nbytes))
    src.check()
    dst.check()

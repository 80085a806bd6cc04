# SPDX-License-Identifier: Apache-2.0
"""Which bytes ``transfer_cache_async`` moves (reference API, 10.2 and 10.3), on every setup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests.asynchronous.helpers import KNE, PEER, PI, SUCCESS, WAIT_MS, Far, Ready, Source
from tests.conformance.conftest import EVERY_WAY, Linked
from tests.peers import Service

Maker = Callable[..., Any]


@pytest.fixture
def here(answering: Linked) -> Service:
    return answering[1]


@pytest.fixture
def far(answering: Linked) -> Far:
    return Far(answering[2])


@pytest.fixture
def kind(answering: Linked) -> str:
    return answering[0].kind


@pytest.fixture(params=["key", "addresses"])
def config(request: pytest.FixtureRequest, far: Far) -> Maker:
    """A config for rows [row] of layers ``dst`` of the peer's cache, of either class."""

    def make(name: str, cache_id: int, src: range, dst: range, row: int = 0, src_row: int = 0):
        if request.param == "key":
            key = CacheKeyByIdAndIndex(PEER, cache_id, row)
            return TransferWithCacheKeyConfig(key, src, dst, src_row)
        span = far.spans[name]
        addrs = far.call("addresses", name)[dst.start * 2 : dst.stop * 2]
        return TransferConfig(PEER, [a + row * span.row_stride_bytes for a in addrs], src, src_row)

    return make


def run(here: Service, source: Source, configs: list[Any], *args: Any) -> list[Any]:
    synchronizer = Ready()
    task = here.manager.transfer_cache_async(source.cache, synchronizer, configs, *args)
    results = task.get_results(WAIT_MS)
    assert task.done()
    return results


@EVERY_WAY
def test_rows(here: Service, far: Far, kind: str, config: Maker) -> None:
    """Row to row, at other layers and another row (section 14, 1)."""
    source = Source(here, "src", 6, 2, 16, paged=False)
    cache_id = far.make(kind, "dst", 8, 3, 24, paged=False)
    configs = [config("dst", cache_id, range(1, 3), range(2, 4), row=2, src_row=1)]
    assert run(here, source, configs) == [SUCCESS]
    far.expect("dst", *[(t + 2, 48, source.part(t, 16, 16)) for t in range(2, 6)])


@EVERY_WAY
def test_a_row_is_cut_into_blocks(here: Service, far: Far, kind: str, config: Maker) -> None:
    """The tail is cut at the row, not at the tensor (section 14, 7)."""
    source = Source(here, "src", 4, 2, 28, paged=False)
    cache_id = far.make(kind, "dst", 4, 6, 8, paged=True)
    configs = [config("dst", cache_id, range(2), range(2), src_row=1)]
    assert run(here, source, configs, None, [5, 0, 3, 2], 8) == [SUCCESS]
    pieces = [(5, 0, 8), (0, 8, 8), (3, 16, 8), (2, 24, 4)]
    far.expect(
        "dst", *[(t, b * 8, source.part(t, 28 + at, n)) for t in range(4) for b, at, n in pieces]
    )


def test_a_row_is_not_read_beyond_its_end(here: Service, far: Far, config: Maker) -> None:
    source = Source(here, "src", 2, 2, 28, paged=False)
    cache_id = far.make("allocated", "dst", 2, 6, 8, paged=True)
    configs = [config("dst", cache_id, range(1), range(1))]
    assert run(here, source, configs, None, [5, 0, 3, 2, 1], 8) == [PI]
    far.expect("dst")


@EVERY_WAY
@pytest.mark.parametrize("size", [None, 0, 8])
def test_blocks(here: Service, far: Far, kind: str, config: Maker, size: int | None) -> None:
    source = Source(here, "src", 4, 5, 8, paged=True)
    cache_id = far.make(kind, "dst", 6, 6, 8, paged=True)
    configs = [config("dst", cache_id, range(2), range(1, 3))]
    assert run(here, source, configs, (4, 0, 1), (5, 2, 3), size) == [SUCCESS]
    pairs = [(4, 5), (0, 2), (1, 3)]
    far.expect(
        "dst", *[(t + 2, d * 8, source.part(t, s * 8, 8)) for t in range(4) for s, d in pairs]
    )


@EVERY_WAY
def test_all_blocks_without_indices(here: Service, far: Far, kind: str, config: Maker) -> None:
    """To blocks of the same numbers, of which the peer may have more."""
    source = Source(here, "src", 4, 5, 8, paged=True)
    cache_id = far.make(kind, "dst", 6, 6, 8, paged=True)
    assert run(here, source, [config("dst", cache_id, range(2), range(1, 3))]) == [SUCCESS]
    far.expect("dst", *[(t + 2, 0, source.part(t, 0, 40)) for t in range(4)])


def test_all_blocks_must_fit(here: Service, far: Far) -> None:
    source = Source(here, "src", 2, 5, 8, paged=True)
    fewer = far.make("allocated", "dst", 2, 4, 8, paged=True)
    assert run(here, source, [_key(fewer)]) == [PI]
    larger = far.make("allocated", "larger", 2, 5, 16, paged=True)
    assert run(here, source, [_key(larger)]) == [PI]
    far.expect("dst")


def test_blocks_of_strided_views(here: Service, far: Far, config: Maker) -> None:
    """Rows apart on both sides, as in vLLM's interleaved caches."""
    source = Source(here, "src", 2, 5, 8, paged=True, row_stride_bytes=24)
    cache_id = far.make("tensors", "dst", 2, 6, 8, paged=True, row_stride_bytes=20)
    configs = [config("dst", cache_id, range(1), range(1))]
    assert run(here, source, configs, [1, 4], [3, 0]) == [SUCCESS]
    pairs = [(1, 3), (4, 0)]
    far.expect("dst", *[(t, d * 20, source.part(t, s * 24, 8)) for t in range(2) for s, d in pairs])


def test_by_blocks_key(here: Service, far: Far) -> None:
    source = Source(here, "src", 4, 5, 8, paged=True)
    far.make("allocated", "dst", 4, 6, 8, paged=True, keys=BlocksCacheKey(PEER, 3))
    config = TransferWithCacheKeyConfig(BlocksCacheKey(PEER, 3), range(1, 2), range(1, 2))
    assert run(here, source, [config], [0], [5]) == [SUCCESS]
    far.expect("dst", *[(t, 40, source.part(t, 0, 8)) for t in (2, 3)])


def test_a_row_to_a_block(here: Service, far: Far, config: Maker) -> None:
    """Without indices, a block that has room takes a row."""
    source = Source(here, "src", 2, 2, 8, paged=False)
    cache_id = far.make("allocated", "dst", 2, 6, 8, paged=True)
    assert run(here, source, [config("dst", cache_id, range(1), range(1), row=4)]) == [SUCCESS]
    far.expect("dst", *[(t, 32, source.part(t, 0, 8)) for t in range(2)])


def test_addresses_in_several_caches(here: Service, far: Far) -> None:
    """K and V of a layer need not lie in one cache; addresses may point to a row inside."""
    source = Source(here, "src", 2, 2, 16, paged=False)
    far.make("allocated", "k", 1, 4, 16, paged=False)
    far.make("tensors", "v", 3, 4, 16, paged=False)
    k, v = far.call("addresses", "k"), far.call("addresses", "v")
    config = TransferConfig(PEER, (k[0] + 16, v[2] + 48), None, 1)
    assert run(here, source, [config]) == [SUCCESS]
    far.expect("k", (0, 16, source.part(0, 16, 16)))
    far.expect("v", (2, 48, source.part(1, 16, 16)))


# -- what does not fit ----------------------------------------------------------------------------


def _at(far: Far, name: str, offset: int = 0) -> TransferConfig:
    return TransferConfig(PEER, [a + offset for a in far.call("addresses", name)[:2]], range(1))


def _key(cache_id: int, row: int = 0, dst: range = range(1)) -> TransferWithCacheKeyConfig:
    return TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(PEER, cache_id, row), range(1), dst)


@pytest.mark.parametrize("offset", [-1, 17, 3 * 16 + 1, 1 << 40], ids=str)
def test_addresses_must_be_in_a_cache(here: Service, far: Far, offset: int) -> None:
    """Nothing is written outside of what the peer has registered (section 14, 26)."""
    source = Source(here, "src", 2, 2, 40, paged=False)
    far.make("tensors", "dst", 2, 3, 16, paged=False)
    assert run(here, source, [_at(far, "dst", offset)]) == [PI]
    far.expect("dst")


def test_addresses_must_be_open_to_others(here: Service, far: Far) -> None:
    source = Source(here, "src", 2, 2, 16, paged=False)
    far.make("tensors", "dst", 2, 3, 16, paged=False, accessible=False)
    assert run(here, source, [_at(far, "dst")]) == [PI]
    assert run(here, source, [TransferConfig(PEER, [0, 2**64 - 1], range(1))]) == [PI]
    far.expect("dst")


def test_a_strided_row_has_no_room_between(here: Service, far: Far) -> None:
    source = Source(here, "src", 2, 2, 16, paged=False)
    far.make("tensors", "dst", 2, 3, 16, paged=True, row_stride_bytes=32)
    assert run(here, source, [_at(far, "dst", 1)]) == [PI]
    assert run(here, source, [_at(far, "dst", 16)]) == [PI]  # between two blocks
    blocks = Source(here, "blocks", 2, 2, 16, paged=True)
    assert run(here, blocks, [_at(far, "dst", 8)], [0], [0]) == [PI]
    far.expect("dst")


def test_rows_must_fit(here: Service, far: Far) -> None:
    """Section 14, 11."""
    source = Source(here, "src", 2, 2, 24, paged=False)
    cache_id = far.make("allocated", "dst", 2, 3, 16, paged=False)
    assert run(here, source, [_key(cache_id)]) == [PI]
    assert run(here, source, [_at(far, "dst", 32)]) == [PI]
    assert run(here, source, [_key(cache_id, row=3)]) == [KNE]
    assert run(here, source, [_key(cache_id, dst=range(1, 2))]) == [PI]
    assert run(here, source, [_key(cache_id + 5)]) == [KNE]
    far.expect("dst")


@pytest.mark.parametrize(
    ("block", "indices"),
    [(12, ([0], [0])), (12, (None, [0], 8)), (16, ([0], [6])), (16, ([5], [0]))],
    ids=str,
)
def test_blocks_must_fit(here: Service, far: Far, block: int, indices: tuple[Any, ...]) -> None:
    """Other block sizes (section 14, 10) and ids out of range."""
    source = Source(here, "src", 2, 5, 16, paged=indices[0] is not None)
    cache_id = far.make("allocated", "dst", 2, 6, block, paged=True)
    assert run(here, source, [_key(cache_id), _at(far, "dst")], *indices) == [PI, PI]
    far.expect("dst")


def test_what_the_source_does_not_have(here: Service, far: Far) -> None:
    source = Source(here, "src", 2, 2, 16, paged=False)
    cache_id = far.make("allocated", "dst", 2, 3, 16, paged=True)
    late = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(PEER, cache_id), range(1), range(1), 2)
    assert run(here, source, [late]) == [PI]  # row
    assert run(here, source, [_key(cache_id)], [0], [0]) == [PI]  # blocks
    assert run(here, source, [_key(cache_id)], None, [0], 0) == [PI]
    assert run(here, source, [_key(cache_id)], None, [0], 32) == [PI]  # all of the tensor
    blocks = Source(here, "blocks", 2, 2, 16, paged=True)
    assert run(here, blocks, [_key(cache_id)], [0], [0], 8) == [PI]
    assert run(here, blocks, [_key(cache_id)], [0, 1], [1, 1]) == [PI]  # twice the same block
    assert run(here, blocks, [_key(cache_id, row=1)], [0], [0]) == [PI]
    assert run(here, blocks, [_key(cache_id)], [2**63], [0]) == [PI]
    far.expect("dst")


def test_block_indices_need_blocks(here: Service, far: Far) -> None:
    blocks = Source(here, "blocks", 2, 2, 16, paged=True)
    cache_id = far.make("allocated", "dst", 2, 3, 16, paged=False)
    assert run(here, blocks, [_key(cache_id)], [0], [0]) == [PI]
    far.expect("dst")


# -- the other mode -------------------------------------------------------------------------------


def test_remote_accessible_mode(here: Service, far: Far, answering: Linked) -> None:
    """Both kinds of config are accepted in both modes; in one both caches must be accessible."""
    source = Source(here, "src", 2, 2, 16, paged=False)
    cache_id = far.make("allocated", "dst", 2, 3, 16, paged=False)
    assert run(here, source, [_key(cache_id, row=1), _at(far, "dst")]) == [SUCCESS, SUCCESS]
    parts = [(t, at, source.part(t, 0, 16)) for t in range(2) for at in (0, 16)]
    far.expect("dst", *parts)
    closed = Source(here, "closed", 2, 2, 16, paged=False, accessible=False)
    assert run(here, closed, [_key(cache_id)]) == [PI if answering[0].remote else SUCCESS]

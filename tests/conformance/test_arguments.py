# SPDX-License-Identifier: Apache-2.0
"""What pulls and pushes refuse, with which error, in which order (reference API, 9.3 and 9.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from tests.conformance.conftest import linked_by
from tests.conformance.setups import ANSWERS, ME, PEER, params
from tests.peers import Peer, Ref, Service

pytestmark = pytest.mark.same_on_every_device

UNLINKED = 5
NONE = 2**64 - 1
PI, KNE, NYL = "LLM_PARAM_INVALID", "LLM_KV_CACHE_NOT_EXIST", "LLM_NOT_YET_LINK"
TYPE, VALUE, ATTRIBUTE = "TypeError", "ValueError", "AttributeError"


@pytest.fixture(scope="module", params=params(ANSWERS))
def world(request: pytest.FixtureRequest, process: Peer) -> Iterator[tuple[Service, Any]]:
    """Caches: 1 contiguous 2 x [3, 16], 2 blocks 2 x [4, 16]; "gone" has been deallocated."""
    with linked_by(request.param, process) as (_, here, far):
        make_caches(here, far)
        yield here, far


def make_caches(here: Service, far: Any) -> None:
    keys = (CacheKey(PEER, 1), CacheKey(PEER, NONE, 0, 2))
    far.call("allocate", "rows", 2, 3, 16, paged=False, keys=keys)
    far.call("allocate", "blocks", 2, 4, 16, paged=True, keys=BlocksCacheKey(PEER, 0))
    far.call("register", "closed", 2, 3, 16, paged=False, accessible=False)
    far.call("allocate", "wide", 2, 4, 17, paged=True, keys=BlocksCacheKey(PEER, 9))
    far.call("fill", "rows", 1)
    here.allocate("rows", 2, 3, 16, paged=False)
    here.allocate("odd", 3, 3, 16, paged=False)
    here.allocate("blocks", 2, 4, 16, paged=True)
    here.allocate("odd_blocks", 3, 4, 16, paged=True)
    here.register("closed", 2, 3, 16, paged=False, accessible=False)
    for name, paged in (("gone", False), ("gone_blocks", True)):
        here.allocate(name, 2, 3, 16, paged=paged)
        cache = here.held[name].cache
        end = here.manager.deallocate_blocks_cache if paged else here.manager.deallocate_cache
        end(cache)


ROW = CacheKeyByIdAndIndex(PEER, 1, 0)
BLOCKS = BlocksCacheKey(PEER, 0)


def status_of(service: Service, operation: str, arguments: dict[str, Any]) -> str:
    before = [service.dump(name) for name in ("rows", "odd", "blocks", "odd_blocks", "closed")]
    failure = service.attempt(operation, **arguments)
    afterwards = [service.dump(name) for name in ("rows", "odd", "blocks", "odd_blocks", "closed")]
    assert failure is None or before == afterwards, "a refused call changed memory"
    return "" if failure is None else failure.status or failure.kind


PULL_CACHE = {"cache_key": ROW, "cache": Ref("rows"), "batch_index": 0, "size": -1}
PULL_BLOCKS = {"src_cache_key": BLOCKS, "dst_cache": Ref("blocks"), "src_blocks": [0],
               "dst_blocks": [1]}  # fmt: skip
PUSH_CACHE = {"dst_cache_key": ROW, "src_cache": Ref("rows"), "src_batch_index": 0}
PUSH_BLOCKS = {"dst_cache_key": BLOCKS, "src_cache": Ref("blocks"), "src_blocks": [0],
               "dst_blocks": [1]}  # fmt: skip
GOOD = {"pull_cache": PULL_CACHE, "pull_blocks": PULL_BLOCKS, "push_cache": PUSH_CACHE,
        "push_blocks": PUSH_BLOCKS}  # fmt: skip

RANGES: list[tuple[dict[str, Any], str]] = [
    ({"src_layer_range": 1}, TYPE),
    ({"src_layer_range": [0]}, TYPE),
    ({"src_layer_range": range(0, 2, 2)}, PI),
    ({"src_layer_range": range(1, 0, -1)}, PI),
    ({"src_layer_range": range(-1, 1)}, PI),
    ({"src_layer_range": range(0)}, PI),  # section 14, 5
    ({"dst_layer_range": range(3, 3)}, PI),
    ({"dst_layer_range": range(2)}, PI),
    ({"src_layer_range": range(2)}, PI),
    ({"src_layer_range": range(1), "dst_layer_range": range(1, 2)}, PI),
    ({"src_layer_range": range(1, 2), "dst_layer_range": range(1)}, PI),
    ({"src_layer_range": range(10**12)}, PI),  # section 14, 33b
    ({"tensor_num_per_layer": -1}, VALUE),
    ({"tensor_num_per_layer": 2**32}, VALUE),
    ({"tensor_num_per_layer": 1.0}, TYPE),
    ({"tensor_num_per_layer": "2"}, TYPE),
    ({"tensor_num_per_layer": 0}, PI),
    ({"src_layer_range": range(1), "tensor_num_per_layer": 3}, PI),
    ({"src_layer_range": range(1), "dst_layer_range": range(1)}, ""),
    ({"src_layer_range": range(1)}, ""),
    ({"dst_layer_range": range(1)}, ""),
    (
        {
            "src_layer_range": range(1, 2),
            "dst_layer_range": range(1),
            "tensor_num_per_layer": 1,
        },
        "",
    ),
]


@pytest.mark.parametrize("operation", list(GOOD))
@pytest.mark.parametrize(("changes", "expected"), RANGES, ids=lambda value: str(value))
def test_layer_ranges(
    world: tuple[Service, Peer], operation: str, changes: dict[str, Any], expected: str
) -> None:
    pull = operation.startswith("pull")
    if pull and "src_layer_range" in changes and changes["src_layer_range"] == range(10**12):
        expected = VALUE
    assert status_of(world[0], operation, GOOD[operation] | changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"src_layer_range": range(2**32, 2**32 + 1)}, VALUE),
        ({"tensor_num_per_layer": 7}, ""),  # only looked at with a range
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", ["pull_cache", "pull_blocks"])
def test_layer_ranges_of_pulls(
    world: tuple[Service, Peer], operation: str, changes: dict[str, Any], expected: str
) -> None:
    assert status_of(world[0], operation, GOOD[operation] | changes) == expected


CASES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "pull_cache": [
        ({"cache_key": None}, TYPE),
        ({"cache_key": BLOCKS}, TYPE),
        ({"cache_key": 1}, TYPE),
        ({"cache": None}, TYPE),
        ({"cache": 1}, TYPE),
        ({"batch_index": -1}, VALUE),
        ({"batch_index": 2**32}, VALUE),
        ({"batch_index": "0"}, TYPE),
        ({"batch_index": None}, TYPE),
        ({"size": 1.0}, TYPE),
        ({"size": 2**63}, VALUE),
        ({"cache": Ref("blocks")}, PI),
        ({"size": 0}, PI),
        ({"size": -2}, PI),
        ({"cache_key": CacheKey(PEER, NONE)}, PI),
        ({"cache_key": CacheKey(PEER, 1, 0, 1)}, PI),
        ({"cache_key": CacheKeyByIdAndIndex(PEER, -1)}, PI),  # section 14, 16b
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 0)}, KNE),  # section 14, 14
        ({"cache_key": CacheKeyByIdAndIndex(ME, 1)}, PI),
        ({"cache": Ref("gone")}, KNE),
        ({"batch_index": 3}, PI),
        ({"size": 17}, PI),
        ({"cache_key": CacheKeyByIdAndIndex(UNLINKED, 1)}, NYL),
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 99)}, KNE),
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 1, 3)}, KNE),
        ({"cache_key": CacheKey(PEER, 99)}, KNE),
        ({"cache_key": CacheKey(PEER, 1, 1)}, KNE),
        ({"cache_key": CacheKey(PEER, NONE, 0, 1)}, KNE),
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 2)}, PI),  # a blocks cache
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 3)}, PI),  # not remote accessible
        ({"cache": Ref("odd")}, PI),
        ({"cache_key": CacheKey(PEER, NONE, 0, 2)}, ""),
        ({"size": 16, "batch_index": True}, ""),  # section 14, 36
        ({"size": 1}, ""),
    ],
    "pull_blocks": [
        ({"src_cache_key": None}, TYPE),
        ({"src_cache_key": 1}, TYPE),
        ({"dst_cache": None}, TYPE),
        ({"src_blocks": None}, TYPE),
        ({"dst_blocks": None}, TYPE),
        ({"src_blocks": "0"}, TYPE),
        ({"src_blocks": ["0"]}, TYPE),
        ({"dst_blocks": [1.0]}, TYPE),
        ({"dst_cache": Ref("rows")}, PI),
        ({"dst_blocks": []}, PI),
        ({"src_blocks": []}, PI),
        ({"src_cache_key": ROW}, PI),  # with src_blocks
        ({"src_cache_key": CacheKey(PEER, NONE), "src_blocks": []}, PI),
        ({"src_cache_key": CacheKeyByIdAndIndex(PEER, -1), "src_blocks": []}, PI),
        ({"src_cache_key": BlocksCacheKey(ME, 0)}, PI),
        ({"dst_cache": Ref("gone_blocks")}, KNE),
        ({"src_blocks": [0, 1]}, PI),
        ({"dst_blocks": [0, 1]}, PI),
        ({"dst_blocks": [4]}, PI),
        ({"dst_blocks": [-1]}, PI),
        ({"src_blocks": [0, 1], "dst_blocks": [2, 2]}, PI),
        ({"src_cache_key": BlocksCacheKey(UNLINKED, 0)}, NYL),
        ({"src_cache_key": BlocksCacheKey(PEER, 1)}, KNE),
        ({"src_blocks": [4]}, PI),
        ({"src_blocks": [-1]}, PI),
        ({"src_cache_key": BlocksCacheKey(PEER, 9)}, PI),  # section 14, 10
        ({"dst_cache": Ref("odd_blocks")}, PI),
        ({"src_cache_key": CacheKeyByIdAndIndex(PEER, 2), "src_blocks": []}, PI),
        ({"src_cache_key": CacheKeyByIdAndIndex(PEER, 1, 3), "src_blocks": []}, KNE),
        ({"src_cache_key": ROW, "src_blocks": [], "dst_blocks": [0, 1]}, PI),
        ({"src_cache_key": ROW, "src_blocks": []}, ""),
        ({"src_cache_key": CacheKey(PEER, NONE, 0, 2), "src_blocks": ()}, ""),
        ({"src_blocks": [3, 3], "dst_blocks": (0, 1)}, ""),
    ],
    "push_cache": [
        ({"dst_cache_key": None}, TYPE),
        ({"dst_cache_key": CacheKey(PEER, 1)}, TYPE),
        ({"dst_cache_key": BLOCKS}, TYPE),
        ({"src_cache": None}, TYPE),
        ({"src_batch_index": -1}, VALUE),
        ({"src_cache": Ref("blocks")}, PI),
        ({"size": 16}, PI),
        ({"size": 0}, PI),
        ({"size": "1"}, TYPE),
        ({"tensor_num_per_layer": 3}, PI),  # section 14, 6
        ({"dst_cache_key": CacheKeyByIdAndIndex(ME, 1)}, PI),
        ({"dst_cache_key": CacheKeyByIdAndIndex(PEER, -1)}, PI),
        ({"src_cache": Ref("gone")}, KNE),
        ({"src_batch_index": 3}, PI),
        ({"dst_cache_key": CacheKeyByIdAndIndex(UNLINKED, 1)}, NYL),
        ({"dst_cache_key": CacheKeyByIdAndIndex(PEER, 99)}, KNE),
        ({"dst_cache_key": CacheKeyByIdAndIndex(PEER, 1, 3)}, KNE),
        ({"dst_cache_key": CacheKeyByIdAndIndex(PEER, 2)}, PI),
        ({"dst_cache_key": CacheKeyByIdAndIndex(PEER, 3)}, PI),
        ({"src_cache": Ref("odd")}, PI),
        ({"src_cache": Ref("odd"), "tensor_num_per_layer": 1}, PI),
        ({}, ""),
    ],
    "push_blocks": [
        ({"dst_cache_key": None}, ATTRIBUTE),
        ({"dst_cache_key": ROW}, TYPE),
        ({"src_cache": None}, TYPE),
        ({"dst_blocks": None}, TYPE),
        ({"src_cache": Ref("rows")}, PI),
        ({"dst_blocks": []}, PI),
        ({"src_blocks": []}, PI),
        ({"dst_cache_key": BlocksCacheKey(ME, 0)}, PI),
        ({"src_cache": Ref("gone_blocks")}, KNE),
        ({"src_blocks": [0, 1]}, PI),
        ({"src_blocks": [4]}, PI),
        ({"src_blocks": [0, 1], "dst_blocks": [2, 2]}, PI),
        ({"dst_cache_key": BlocksCacheKey(UNLINKED, 0)}, NYL),
        ({"dst_cache_key": BlocksCacheKey(PEER, 1)}, KNE),
        ({"dst_blocks": [4]}, PI),
        ({"dst_blocks": [-1]}, PI),
        ({"dst_cache_key": BlocksCacheKey(PEER, 9)}, PI),
        ({"src_cache": Ref("odd_blocks"), "tensor_num_per_layer": 3}, PI),
        ({"src_blocks": [0, 0], "dst_blocks": [2, 3]}, ""),
    ],
}


@pytest.mark.parametrize(
    ("operation", "changes", "expected"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
    ids=str,
)
def test_rows_of_the_tables(
    world: tuple[Service, Peer], operation: str, changes: dict[str, Any], expected: str
) -> None:
    here, far = world
    before = far.call("counters")
    assert status_of(here, operation, GOOD[operation] | changes) == expected
    afterwards = far.call("counters")
    # Only the lease may still be on its way back.
    assert {k: afterwards[k] for k in ("caches",)} == {k: before[k] for k in ("caches",)}


ORDER: dict[str, list[tuple[dict[str, Any], str]]] = {
    "pull_cache": [
        ({"cache_key": None}, TYPE),
        ({"cache": 1}, TYPE),
        ({"batch_index": -1}, VALUE),
        ({"size": 2**63}, VALUE),
        ({"cache": Ref("blocks")}, PI),
        ({"tensor_num_per_layer": "2"}, TYPE),
        ({"src_layer_range": 1}, TYPE),
    ],
    "pull_blocks": [
        ({"src_cache_key": 1}, TYPE),
        ({"dst_cache": Ref("rows"), "src_blocks": ["0"]}, TYPE),
        ({"dst_cache": Ref("rows"), "src_blocks": [0]}, PI),
        ({"dst_cache": Ref("blocks"), "dst_blocks": []}, PI),
        ({"dst_blocks": [0], "tensor_num_per_layer": -1}, VALUE),
        ({"tensor_num_per_layer": 2, "src_blocks": []}, PI),
        ({"src_blocks": [0], "src_layer_range": 1}, TYPE),
    ],
    "push_cache": [
        ({"dst_cache_key": None}, TYPE),
        ({"src_cache": 1}, TYPE),
        ({"src_batch_index": -1}, VALUE),
        ({"src_cache": Ref("blocks")}, PI),
        ({"tensor_num_per_layer": "2"}, TYPE),
        ({"src_layer_range": 1}, TYPE),
        ({"size": "1"}, TYPE),
    ],
}


@pytest.mark.parametrize("operation", list(ORDER))
def test_order_of_the_checks(world: tuple[Service, Peer], operation: str) -> None:
    """Each fault is reported before all that come after it in the table."""
    steps = ORDER[operation]
    for at, (changes, expected) in enumerate(steps):
        later: dict[str, Any] = {}
        for others, _ in reversed(steps[at:]):
            later |= others
        assert changes.items() <= later.items()
        assert status_of(world[0], operation, GOOD[operation] | later) == expected


def test_order_of_the_engine_checks(world: tuple[Service, Peer]) -> None:
    """Own cluster, local cache, local arguments, link, the peer's cache (9.3)."""
    here, _ = world
    own, stranger = CacheKeyByIdAndIndex(ME, 99), CacheKeyByIdAndIndex(UNLINKED, 99)
    for changes, expected in (
        ({"cache_key": own, "cache": Ref("gone"), "batch_index": 9}, PI),
        ({"cache_key": stranger, "cache": Ref("gone"), "batch_index": 9}, KNE),
        ({"cache_key": stranger, "batch_index": 9}, PI),
        ({"cache_key": stranger}, NYL),
        ({"cache_key": CacheKeyByIdAndIndex(PEER, 99)}, KNE),
    ):
        assert status_of(here, "pull_cache", PULL_CACHE | changes) == expected


@pytest.mark.parametrize("operation", ["pull_cache", "push_cache"])
def test_local_cache_must_be_accessible_in_remote_mode(
    world: tuple[Service, Peer], operation: str
) -> None:
    here, _ = world
    name = "cache" if operation == "pull_cache" else "src_cache"
    expected = PI if here.instance.config.remote_accessible else ""
    assert status_of(here, operation, GOOD[operation] | {name: Ref("closed")}) == expected


def test_other_batch_dim_is_refused(world: tuple[Service, Peer]) -> None:
    """Section 14, 18."""
    from llm_datadist_torch import CacheDesc, DataType

    here, _ = world
    desc = CacheDesc(2, [16, 3], DataType.DT_UINT8, batch_dim_index=1)
    cache = here.manager.allocate_cache(desc)
    failure = here.attempt("pull_cache", ROW, cache, 0, 3)
    assert failure is not None
    assert failure.status == PI
    here.manager.deallocate_cache(cache)


@pytest.mark.parametrize("operation", ["pull_cache", "pull_blocks"])
def test_unknown_keywords_are_refused(world: tuple[Service, Peer], operation: str) -> None:
    """A misspelt layer range must not pull all layers (the reference ignores it)."""
    failure = world[0].attempt(operation, **GOOD[operation], src_layer_rnage=range(1))
    assert failure is not None
    assert failure.kind == "TypeError"

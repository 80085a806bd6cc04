# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes in both modes by every way (reference API, 9.3, 9.4 and appendix A)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, Placement
from tests.conformance.conftest import Linked
from tests.conformance.setups import PEER, Pair
from tests.peers import Peer, Ref, Service, eventually

NONE = 2**64 - 1
PI, KNE = "LLM_PARAM_INVALID", "LLM_KV_CACHE_NOT_EXIST"


class Side:
    """What a cache holds before and after, seen tensor by tensor."""

    def __init__(self, call: Callable[..., Any], name: str, seed: int) -> None:
        self.call, self.name = call, name
        self.before: bytes = call("fill", name, seed)
        self.span = call("span", name)

    def old(self, tensor: int, at: int, nbytes: int) -> bytes:
        start = self.span.starts[tensor] + at
        return self.before[start : start + nbytes]

    def expect(self, *patches: tuple[int, int, bytes]) -> None:
        """Exactly these (tensor, offset, bytes) have changed; everything else is as it was."""
        wanted = bytearray(self.before)
        for tensor, at, data in patches:
            start = self.span.starts[tensor] + at
            wanted[start : start + len(data)] = data
        assert self.call("dump", self.name) == bytes(wanted)


def local_side(pair: Pair, name: str, seed: int) -> Side:
    return Side(lambda what, *args: getattr(pair.here, what)(*args), name, seed)


# -- appendix A -----------------------------------------------------------------------------------


def test_pull_cache_part_of_a_row(pair: Pair) -> None:
    cache_id = pair.make("src", 4, 2, 16, paged=False)
    assert cache_id == 1
    pair.here.register("dst", 4, 2, 16, paged=False)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    pair.here.run("pull_cache", CacheKeyByIdAndIndex(PEER, cache_id, 1), Ref("dst"), 0, 4)
    dst.expect(*[(t, 0, src.old(t, 16, 4)) for t in range(4)])
    src.expect()
    pair.check_way()


def test_pull_cache_layer_ranges(pair: Pair) -> None:
    cache_id = pair.make("src", 4, 2, 16, paged=False)
    pair.here.register("dst", 4, 2, 16, paged=False)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 1)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    pair.here.run("pull_cache", key, Ref("dst"), 1, **layers)
    dst.expect((0, 16, src.old(2, 16, 16)), (1, 16, src.old(3, 16, 16)))
    pair.check_way()
    pair.here.register("one", 1, 2, 16, paged=False)
    assert pair.here.attempt("pull_cache", key, Ref("one"), 0, **layers).status == PI
    layers["tensor_num_per_layer"] = 3
    assert pair.here.attempt("pull_cache", key, Ref("dst"), 0, **layers).status == PI


def test_pull_blocks(pair: Pair) -> None:
    pair.make("src", 4, 4, 16, paged=True, keys=BlocksCacheKey(PEER, 0))
    pair.here.register("dst", 4, 4, 16, paged=True, row_stride_bytes=40)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    pair.here.run("pull_blocks", BlocksCacheKey(PEER, 0), Ref("dst"), [0, 1], [2, 3])
    dst.expect(*[(t, 40 * (2 + k), src.old(t, 16 * k, 16)) for t in range(4) for k in range(2)])
    pair.check_way()


def test_pull_blocks_of_a_row(pair: Pair) -> None:
    pair.make("src", 2, 2, 16, paged=False, keys=(CacheKey(PEER, 5), CacheKey(PEER, 0)))
    pair.here.allocate("dst", 2, 4, 8, paged=True)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    pair.here.run("pull_blocks", CacheKey(PEER, 0), Ref("dst"), [], [1, 0])
    halves = [(t, 8, src.old(t, 16, 8)) for t in range(2)]
    dst.expect(*halves, *[(t, 0, src.old(t, 24, 8)) for t in range(2)])
    pair.check_way()


def test_pull_blocks_with_a_tail(pair: Pair) -> None:
    cache_id = pair.make("src", 1, 2, 28, paged=False)
    pair.here.allocate("dst", 1, 8, 8, paged=True)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 0)
    pair.here.run("pull_blocks", key, Ref("dst"), [], [1, 3, 5, 7])
    pieces = [(0, 8 * (1 + 2 * k), src.old(0, 8 * k, 8 if k < 3 else 4)) for k in range(4)]
    dst.expect(*pieces)
    pair.check_way()
    # The tail belongs to the row (section 14, 7): the last row's too, and no block beyond it.
    dst = local_side(pair, "dst", 3)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 1)
    pair.here.run("pull_blocks", key, Ref("dst"), [], [0, 1, 2, 4])
    dst.expect(
        *[(0, 8 * (k if k < 3 else 4), src.old(0, 28 + 8 * k, 8 if k < 3 else 4)) for k in range(4)]
    )
    assert pair.here.attempt("pull_blocks", key, Ref("dst"), [], [0, 1, 2, 3, 4]).status == PI


def test_pull_cache_sizes(pair: Pair) -> None:
    cache_id = pair.make("src", 1, 2, 256, paged=False)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 0)
    pair.here.allocate("large", 1, 2, 512, paged=False)
    pair.here.allocate("small", 1, 2, 100, paged=False)
    src, large = Side(pair.there, "src", 1), local_side(pair, "large", 2)
    small = local_side(pair, "small", 3)
    for size in (-1, 257, 512):
        assert pair.here.attempt("pull_cache", key, Ref("large"), 0, size).status == PI
    for size in (101, 256):
        assert pair.here.attempt("pull_cache", key, Ref("small"), 0, size).status == PI
    large.expect()
    pair.here.run("pull_cache", key, Ref("large"), 1, 256)
    large.expect((0, 512, src.old(0, 0, 256)))
    # -1 is the destination's row (section 14, 19).
    pair.here.run("pull_cache", key, Ref("small"), 1, -1)
    small.expect((0, 100, src.old(0, 0, 100)))
    pair.check_way()


def test_push_cache(pair: Pair) -> None:
    cache_id = pair.make("dst", 4, 3, 32, paged=False)
    pair.here.register("src", 2, 2, 16, paged=False, row_stride_bytes=24)
    src, dst = local_side(pair, "src", 1), Side(pair.there, "dst", 2)
    key = CacheKeyByIdAndIndex(PEER, cache_id, 2)
    pair.here.run("push_cache", key, Ref("src"), 1)
    dst.expect(*[(t, 64, src.old(t, 24, 16)) for t in range(2)])
    dst = Side(pair.there, "dst", 3)
    pair.here.run("push_cache", key, Ref("src"), 0, range(1), range(1, 2), -1, 2)
    dst.expect(*[(2 + t, 64, src.old(t, 0, 16)) for t in range(2)])
    src.expect()
    pair.check_way()


def test_push_blocks(pair: Pair) -> None:
    pair.make("dst", 4, 6, 16, paged=True, keys=BlocksCacheKey(PEER, 3))
    pair.here.allocate("src", 4, 4, 16, paged=True)
    src, dst = local_side(pair, "src", 1), Side(pair.there, "dst", 2)
    key = BlocksCacheKey(PEER, 3)
    pair.here.run("push_blocks", key, Ref("src"), [3, 3, 0], [0, 5, 1], range(1), range(1, 2))
    moved = [(3, 0), (3, 5), (0, 1)]
    dst.expect(*[(2 + t, 16 * d, src.old(t, 16 * s, 16)) for t in range(2) for s, d in moved])
    pair.check_way()


def test_strided_source(pair: Pair) -> None:
    """Rows of a registered view are found by its row stride, whoever moves the bytes."""
    kind = "tensors" if pair.setup.kind != "ints" else "ints"
    row_stride_bytes = None if kind == "ints" else 50
    pair.there(
        "make",
        kind,
        "src",
        2,
        5,
        20,
        paged=True,
        keys=BlocksCacheKey(PEER),
        row_stride_bytes=row_stride_bytes,
    )
    pair.here.register("dst", 2, 5, 20, paged=True, row_stride_bytes=33)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    step = row_stride_bytes or 20
    pair.here.run("pull_blocks", BlocksCacheKey(PEER), Ref("dst"), [4, 0], [0, 4])
    dst.expect(
        *[(t, 0, src.old(t, 4 * step, 20)) for t in range(2)],
        *[(t, 4 * 33, src.old(t, 0, 20)) for t in range(2)],
    )


def test_relay_in_many_messages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_datadist_torch.transports.local.relayed.RELAY_CHUNK", 100)
    pair.make("src", 3, 5, 64, paged=True, keys=BlocksCacheKey(PEER))
    pair.here.allocate("dst", 3, 5, 64, paged=True)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    ids = ([4, 2, 0, 1], [0, 1, 2, 4])
    pair.here.run("pull_blocks", BlocksCacheKey(PEER), Ref("dst"), *ids)
    dst.expect(
        *[(t, 64 * d, src.old(t, 64 * s, 64)) for t in range(3) for s, d in zip(*ids, strict=True)]
    )
    dst = local_side(pair, "dst", 3)
    pair.here.run("push_blocks", BlocksCacheKey(PEER), Ref("dst"), [0], [3], tensor_num_per_layer=1)
    src.expect(*[(t, 64 * 3, dst.old(t, 0, 64)) for t in range(3)])
    pair.check_way()


def test_host_to_host(pair: Pair) -> None:
    """Every pair of placements works (in the reference HOST to HOST does not)."""
    extra = {} if pair.setup.kind == "allocated" else {"accessible": True}
    pair.make(
        "src", 1, 2, 64, paged=True, keys=BlocksCacheKey(PEER), placement=Placement.HOST, **extra
    )
    pair.here.allocate("dst", 1, 2, 64, paged=True, placement=Placement.HOST)
    src, dst = Side(pair.there, "src", 1), local_side(pair, "dst", 2)
    pair.here.run("pull_blocks", BlocksCacheKey(PEER), Ref("dst"), [1], [0])
    dst.expect((0, 0, src.old(0, 64, 64)))


# -- keys and what a pull consumes ----------------------------------------------------------------


def pull(service: Service, key: Any, name: str = "dst", *args: Any, **kwargs: Any) -> str:
    failure = service.attempt("pull_cache", key, Ref(name), *args, **kwargs)
    return "" if failure is None else failure.status


def keys_left(far: Peer, number: int) -> bool:
    return eventually(lambda: far.call("counters")["keys"] == number)


def test_a_pull_consumes_its_key(apart: Linked) -> None:
    setup, here, far = apart
    keys = (CacheKey(PEER, 10), CacheKey(PEER, 11))
    far.call("allocate", "src", 4, 2, 16, paged=False, keys=keys)
    here.allocate("dst", 4, 2, 16, paged=False)
    assert pull(here, keys[0]) == ""
    assert pull(here, keys[0]) == ("" if setup.remote else KNE)
    far.call("drop", "src")
    # One key is left, and keeps the cache until it is pulled.
    assert far.call("counters")["caches"] == 1
    assert pull(here, keys[1]) == ""
    if not setup.remote:
        assert eventually(lambda: far.call("counters")["caches"] == 0)
        assert pull(here, keys[1]) == KNE
        assert pull(here, CacheKeyByIdAndIndex(PEER, 1, 0)) == KNE
    else:
        assert far.call("counters")["keys"] == 2
        far.call("run", "remove_cache_key", keys[0])
        assert far.call("counters")["caches"] == 1
        far.call("run", "remove_cache_key", keys[1])
        assert far.call("counters")["caches"] == 0


@pytest.mark.parametrize("by_id", [False, True])
def test_layer_by_layer_is_counted_per_key(apart: Linked, by_id: bool) -> None:
    """Section 14, 15: what was pulled by one key says nothing about the other."""
    setup, here, far = apart
    keys = (CacheKey(PEER, 10), CacheKey(PEER, 11))
    cache_id = far.call("allocate", "src", 4, 2, 16, paged=False, keys=keys)
    here.allocate("dst", 4, 2, 16, paged=False)
    names = [CacheKeyByIdAndIndex(PEER, cache_id, row) for row in (0, 1)] if by_id else keys
    first = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    second = {"src_layer_range": range(1, 2), "dst_layer_range": range(1, 2)}
    assert pull(here, names[0], **first) == ""
    assert pull(here, names[0], **first) == ""
    assert pull(here, names[1], **first) == ""
    assert far.call("counters")["keys"] == 2
    assert pull(here, names[0], **second) == ""
    assert keys_left(far, 2 if setup.remote else 1)
    assert pull(here, keys[1], **first) == ""
    assert pull(here, keys[0]) == ("" if setup.remote else KNE)
    assert pull(here, names[1], **second) == ""
    assert keys_left(far, 2 if setup.remote else 0)


def test_what_is_not_consumed(apart: Linked) -> None:
    _, here, far = apart
    prefix = CacheKey(PEER, NONE, 0, 4)
    far.call("allocate", "prefix", 2, 1, 16, paged=False, keys=(prefix,))
    request = CacheKey(PEER, 12)
    far.call("register", "registered", 2, 1, 16, paged=False, keys=(request,))
    blocks = BlocksCacheKey(PEER, 1)
    far.call("allocate", "blocks", 2, 1, 16, paged=True, keys=blocks)
    here.allocate("dst", 2, 1, 16, paged=False)
    here.allocate("dst_blocks", 2, 1, 16, paged=True)
    for _ in range(2):
        assert pull(here, prefix) == ""
        assert pull(here, request) == ""
        assert here.attempt("pull_blocks", blocks, Ref("dst_blocks"), [0], [0]) is None
        assert here.attempt("push_blocks", blocks, Ref("dst_blocks"), [0], [0]) is None
        assert here.attempt("push_cache", CacheKeyByIdAndIndex(PEER, 2, 0), Ref("dst")) is None
    assert far.call("counters")["keys"] == 3


def test_by_id_of_a_row_with_a_prefix_key(apart: Linked) -> None:
    """The id is looked up first (section 14, 17)."""
    _, here, far = apart
    keys = (CacheKey(PEER, 1), CacheKey(PEER, NONE, 0, 4))
    cache_id = far.call("allocate", "src", 2, 2, 16, paged=False, keys=keys)
    far.call("paint", "src", 5)
    here.allocate("dst", 2, 1, 16, paged=False)
    for _ in range(2):
        assert pull(here, CacheKeyByIdAndIndex(PEER, cache_id, 1)) == ""
    assert here.colours("dst") == [5]
    assert far.call("counters")["keys"] == 2


def test_a_failed_pull_consumes_nothing(apart: Linked) -> None:
    _, here, far = apart
    key = CacheKey(PEER, 10)
    far.call("allocate", "src", 2, 1, 16, paged=False, keys=(key,))
    here.allocate("other", 4, 1, 16, paged=False)
    here.allocate("large", 2, 1, 17, paged=False)
    assert pull(here, key, "other") == PI
    assert pull(here, key, "large") == PI
    assert eventually(lambda: far.call("counters")["leases"] == 0)
    assert far.call("counters")["keys"] == 1
    here.allocate("dst", 2, 1, 16, paged=False)
    assert pull(here, key) == ""


def test_keys_of_two_models(apart: Linked) -> None:
    """Section 14, 16: same request id, other model, other row."""
    _, here, far = apart
    keys = (CacheKey(PEER, 1, 0), CacheKey(PEER, 1, 7), CacheKey(PEER, NONE, 7, 1))
    far.call("allocate", "src", 1, 3, 16, paged=False, keys=keys)
    src = Side(far.call, "src", 4)
    here.allocate("dst", 1, 1, 16, paged=False)
    for row in (1, 0, 2):
        assert pull(here, keys[row]) == ""
        assert here.dump("dst")[:16] == src.old(0, 16 * row, 16)


def test_live_table(apart: Linked) -> None:
    """Section 14, 24: what the peer makes and ends after the first pull is seen."""
    _, here, far = apart
    here.allocate("dst", 1, 1, 16, paged=False)
    for round_ in range(3):
        cache_id = far.call("allocate", "src", 1, 1, 16, paged=False)
        src = Side(far.call, "src", round_)
        assert pull(here, CacheKeyByIdAndIndex(PEER, cache_id)) == ""
        assert here.dump("dst")[:16] == src.old(0, 0, 16)
        far.call("drop", "src")
        assert pull(here, CacheKeyByIdAndIndex(PEER, cache_id)) == KNE

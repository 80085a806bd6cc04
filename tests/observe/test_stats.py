# SPDX-License-Identifier: Apache-2.0
"""``stats()``: what was moved is what is counted."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch import CacheDesc, RequestKey
from llm_datadist_torch.observe.transfers import NUM_BUCKETS, RECENT, TransferLog
from tests.observe.conftest import BLOCK_BYTES


def test_transfers_are_counted_with_their_bytes(linked):
    _, node, cache, peer = linked
    for _ in range(3):
        peer.pull("kv", cache, [1, 2], [3, 4])
    peer.push("kv", cache, [5])
    peer.pull("kv", cache, layers=range(1))
    with pytest.raises(ld.LLMCacheNotFoundError):
        peer.pull("other", cache)
    stats = node.stats()
    counted = {(each.operation, each.peer): each for each in stats.transfers}
    assert set(counted) == {("pull_blocks", 1), ("push_blocks", 1)}
    pulls, pushes = counted["pull_blocks", 1], counted["push_blocks", 1]
    assert (pulls.count, pulls.nbytes) == (4, 3 * 2 * BLOCK_BYTES + 8 * BLOCK_BYTES // 2)
    assert (pushes.count, pushes.nbytes) == (1, BLOCK_BYTES)
    assert sum(pulls.buckets) == 4
    assert pulls.seconds > 0
    assert pulls.path
    (error,) = stats.errors
    assert (error.operation, error.peer, error.status) == (
        "pull_blocks", 1, "LLM_KV_CACHE_NOT_EXIST",
    )  # fmt: skip
    assert error.count == 1
    assert [each.nbytes for each in stats.recent][:3] == [2 * BLOCK_BYTES] * 3
    assert stats.quantile_us(1, 0.5) <= stats.quantile_us(1, 0.99)
    assert stats.quantile_us(99, 0.5) == 0


def test_rows_and_tails_are_counted_exactly(linked):
    far, node, _, peer = linked
    far.call("allocate", rows=1, layers=1, shape=(10,), dtype=torch.uint8, keys=[RequestKey(1)])
    row = node.allocate(rows=1, layers=1, shape=(10,), dtype=torch.uint8)
    blocks = node.allocate(blocks=4, layers=1, shape=(4,), dtype=torch.uint8)
    peer.pull(RequestKey(1), row)
    peer.pull(RequestKey(1), blocks, dst_blocks=[2, 0, 1])  # 4, 4 and 2 bytes
    nbytes = {each.operation: each.nbytes for each in node.stats().transfers}
    assert nbytes == {"pull_cache": 20, "pull_blocks": 20}


def test_background_and_layerwise_transfers_count_too(linked):
    _, node, cache, peer = linked
    with peer.push_layers("kv", cache, [0]) as push:
        push.ready()
        push.ready()
    (counter,) = node.stats().transfers
    assert (counter.operation, counter.count, counter.nbytes) == ("push_blocks", 2, BLOCK_BYTES)


def test_caches_and_links(linked):
    far, node, cache, _ = linked
    description = CacheDesc(1, [2, 4], torch.int8)
    node.cache_manager.allocate_blocks_cache(description)  # its handle is gone at once
    stats = node.stats()
    kept, dropped = stats.caches
    assert (kept.cache_id, kept.nbytes, kept.dropped) == (cache.cache_id, cache.nbytes, False)
    assert dropped.dropped
    (link,) = stats.links
    assert (link.peer, link.state) == (1, "linked")
    assert link.transports["host"] == "local"
    far.kill()


def test_pools(linked):
    with ld.open(pool_bytes=1 << 20) as node:
        cache = node.allocate(layers=1, blocks=1, shape=(1 << 16,), dtype=torch.uint8)
        (pool,) = node.stats().pools
        assert (pool.name, pool.total_bytes) == ("device", 1 << 20)
        assert pool.free_bytes == (1 << 20) - (2 << 16)
        (found,) = node.stats().caches
        assert found.pool == "device"
        starts = sorted(offset for offset, _ in found.spans)
        addresses = sorted(cache.tensor_addrs)
        assert starts[1] - starts[0] == addresses[1] - addresses[0]
        assert all(0 <= at <= (1 << 20) - size for at, size in found.spans)


def test_json(linked):
    _, node, cache, peer = linked
    peer.pull("kv", cache)
    stats = node.stats()
    assert ld.Stats.from_json(stats.to_json()) == stats
    for text in ("[]", "{}", '{"caches": 1}'):
        with pytest.raises((ValueError, TypeError, KeyError)):
            ld.Stats.from_json(text)


def test_stats_of_a_closed_node():
    node = ld.open()
    node.close()
    with pytest.raises(RuntimeError):
        node.stats()


def test_the_log_is_bounded():
    log = TransferLog()
    for number in range(RECENT + 10):
        log.record("pull_blocks", 1, "path", number, 0)
    assert len(log.recent()) == RECENT
    (counter,) = log.counters()
    assert counter.count == RECENT + 10
    assert counter.buckets[NUM_BUCKETS - 1] + sum(counter.buckets[:-1]) == RECENT + 10


def test_listeners():
    log, seen = TransferLog(), []
    with log.listening(seen.append):
        log.record("pull_blocks", 1, "path", 5, 0)
    log.record("pull_blocks", 1, "path", 6, 0)
    assert [record.nbytes for record in seen] == [5]


# -- what notebooks show --------------------------------------------------------------------------


class Checker(HTMLParser):
    """Every element is closed, and none runs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not [name for name, _ in attrs if name.startswith("on")]
        assert not [value for _, value in attrs if value and "://" in value]
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(thing: object) -> str:
    checker = Checker()
    checker.feed(thing._repr_html_())
    assert checker.open == []
    return checker.text


def test_html(linked):
    _, node, cache, peer = linked
    assert "2 of" not in shown(node)
    peer.pull("kv", cache)
    text = shown(node)
    for part in ("Node 2", "cluster 1: linked by local", "cache 1", "latest transfers"):
        assert part in text
    assert "LLMDataDist 2" in shown(node.datadist)
    assert "8 of 128 B per tensor" in shown(cache)
    with ld.open(pool_bytes=1 << 20) as other:
        named = other.allocate(layers=1, blocks=1, shape=(4,), name="<b>")
        assert "BlocksKey(name='<b>')" in shown(other)
        assert "Cache 1 '<b>'" in shown(named)
        assert "device pool: 128.0 KiB of 1.0 MiB used" in other._repr_html_()
    assert "closed" in shown(other)
    node.close()
    assert "finalize" in shown(cache)
    assert "not initialised" in shown(node.datadist)


# -- top ------------------------------------------------------------------------------------------


def run_top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_datadist_torch", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.needs_rich
def test_top_shows_a_remote_instance(linked):
    far, *_ = linked
    done = run_top(far.address, "--count", "2", "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    assert "cluster 1 at 127.0.0.1" in done.stdout
    assert "linked" in done.stdout
    assert "4 x 8 blocks" in done.stdout
    assert "name='kv'" in done.stdout


@pytest.mark.needs_rich
def test_top_without_an_instance():
    done = run_top("127.0.0.1:1")
    assert done.returncode == 1
    assert "refused" in done.stderr

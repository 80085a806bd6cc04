# SPDX-License-Identifier: Apache-2.0
"""Nodes that connect, and what they pull and push: with real processes, bytes compared."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch import LLMParamError, PrefixKey, RequestKey, RowKey
from tests.front_door.conftest import OpenNode
from tests.front_door.service import paint, values
from tests.peers import eventually
from tests.transfer.helpers import free_port

BLOCKS = {"layers": 3, "blocks": 6, "shape": (4, 2), "dtype": torch.int32}
ROWS = {"layers": 3, "rows": 3, "shape": (8,), "dtype": torch.int32}


@pytest.fixture
def far(processes):
    """Another process with node 1 and a painted cache "kv"; and its address."""
    process = processes()
    process.address = process.call("open", cluster_id=1)
    process.call("allocate", name="kv", **BLOCKS)
    return process


# -- connecting -----------------------------------------------------------------------------------


def test_connecting_needs_no_more_than_an_address(far, open_node: OpenNode):
    node = open_node(cluster_id=2)
    peer = node.connect(far.address)
    assert (peer.cluster_id, peer.address, peer.link.state) == (1, far.address, "linked")
    assert far.call("links") == {2: "linked"}
    again = node.connect(far.address)  # a notebook's cell that is run twice
    assert again.cluster_id == 1
    assert [each.cluster_id for each in node.peers] == [1]
    peer.disconnect()
    peer.disconnect()
    assert eventually(lambda: not far.call("links"))
    assert "not linked" in repr(peer)


def test_host_names_and_pairs(far, open_node: OpenNode):
    port = int(far.address.rpartition(":")[2])
    assert open_node().connect(f"localhost:{port}").cluster_id == 1
    assert open_node().connect(("127.0.0.1", port)).cluster_id == 1


def test_a_link_ends_with_its_block(far, open_node: OpenNode):
    node = open_node(cluster_id=2)
    with node.connect(far.address) as peer:
        assert peer.link.state == "linked"
    assert node.peers == []


def test_the_other_side_finds_its_peer(far, open_node: OpenNode):
    node = open_node(cluster_id=2, listen="127.0.0.1:0")
    target = node.allocate(name="mine", **BLOCKS)
    paint(target, plus=50)
    node.connect(far.address)
    far.call("pull_from", 2, "mine", src_blocks=[0], dst_blocks=[5])
    assert far.call("data")[0][5 * 32 :] == target.tensors[0][0].cpu().numpy().tobytes()
    with pytest.raises(ld.LLMNotLinkedError, match="cluster 77"):
        node.peer(77)


def test_nodes_may_start_in_any_order(open_node: OpenNode):
    port = free_port()
    late: list[ld.Node] = []

    def start() -> None:
        time.sleep(0.3)
        late.append(open_node(cluster_id=1, listen=f"127.0.0.1:{port}"))

    thread = threading.Thread(target=start)
    thread.start()
    assert open_node().connect(f"127.0.0.1:{port}", timeout_s=20).cluster_id == 1
    thread.join()


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (None, TypeError, "address"),
        (("127.0.0.1",), LLMParamError, "no pair"),
        ("127.0.0.1", LLMParamError, "ip:port"),
        (":1", LLMParamError, "has no host"),
        ("127.0.0.1:0", LLMParamError, "has no port"),
        ("no-such-host.invalid:1", ld.LLMLinkError, "no-such-host.invalid"),
    ],
)
def test_wrong_addresses(address, error, text, open_node: OpenNode):
    with pytest.raises(error, match=text):
        open_node().connect(address, timeout_s=1)


def test_nobody_listens(open_node: OpenNode):
    with pytest.raises(ld.LLMLinkError, match="refused"):
        open_node().connect(f"127.0.0.1:{free_port()}", timeout_s=2)


def test_another_secret_and_another_mode(far, open_node: OpenNode):
    secret = open_node(link_secret="a secret of enough characters")
    with pytest.raises(ld.LLMLinkError, match="link_secret"):
        secret.connect(far.address, timeout_s=0.5)
    with pytest.raises(LLMParamError, match="enable_remote_cache_accessible"):
        open_node(remote_accessible=False).connect(far.address)


def test_itself(open_node: OpenNode):
    node = open_node(listen="127.0.0.1:0")
    with pytest.raises(LLMParamError, match="this node itself"):
        node.connect(node.address)


# -- moving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote_accessible", [True, False])
def test_pull_blocks(remote_accessible, processes, open_node: OpenNode):
    far, mode = processes(), {"remote_accessible": remote_accessible}
    address = far.call("open", cluster_id=1, **mode)
    far.call("allocate", name="kv", **BLOCKS)
    node = open_node(**mode)
    target = node.allocate(**BLOCKS)
    peer = node.connect(address)
    for blocks in (([1, 2], [3, 0]), (torch.tensor([1, 2]), (3, 0)), (range(1, 3), [3, 0])):
        paint(target, plus=10_000)
        peer.pull("kv", target, *blocks)
        for number, blocks_of in enumerate(values(target)):
            base = 100 * number
            expected = [base + 2, 10_001 + base, 10_002 + base, base + 1, 10_004 + base]
            assert blocks_of == [*expected, 10_005 + base]


def test_pull_without_blocks_is_all_of_them(far, open_node: OpenNode):
    node = open_node()
    target = node.allocate(**BLOCKS)
    peer = node.connect(far.address)
    paint(target, plus=10_000)
    peer.pull(ld.BlocksKey("kv"), target, dst_blocks=[4])
    assert [row[4] for row in values(target)] == [4, 104, 204, 304, 404, 504]
    peer.pull("kv", target)
    assert values(target)[5] == [500, 501, 502, 503, 504, 505]


@pytest.mark.parametrize("per_layer", [1, 2, 3])
def test_layers_of_any_number_of_tensors(per_layer, processes, open_node: OpenNode):
    far, wanted = processes(), {**BLOCKS, "tensors_per_layer": per_layer}
    address = far.call("open")
    far.call("allocate", name="kv", **wanted)
    node = open_node()
    target = node.allocate(**wanted)
    paint(target, plus=10_000)
    assert [len(target.layer(layer)) for layer in range(3)] == [per_layer] * 3
    node.connect(address).pull("kv", target, [0], layers=range(1, 2), dst_layers=range(2, 3))
    firsts = [row[0] for row in values(target)]
    moved = [100 * (per_layer + at) for at in range(per_layer)]
    assert firsts == [10_000 + 100 * at for at in range(2 * per_layer)] + moved


def test_rows(processes, open_node: OpenNode):
    far = processes()
    address = far.call("open")
    keys = [RequestKey(7, "m"), None, PrefixKey(8, "m")]
    cache_id = far.call("allocate", keys=keys, **ROWS)
    node = open_node()
    peer = node.connect(address)
    target = node.allocate(**ROWS)
    paint(target, plus=10_000)
    peer.pull(RequestKey(7, "m"), target, row=1)
    peer.pull(PrefixKey(8, "m"), target, row=2)
    peer.pull(RowKey(cache_id, 1), target)
    assert values(target) == [[100 * at + row for row in (1, 0, 2)] for at in range(6)]
    blocks = node.allocate(layers=3, blocks=4, shape=(4,), dtype=torch.int32)
    paint(blocks, plus=10_000)
    peer.pull(PrefixKey(8, "m"), blocks, dst_blocks=[3, 0])
    assert [row[0] for row in values(blocks)] == [2, 102, 202, 302, 402, 502]
    with pytest.raises(ld.LLMCacheNotFoundError):
        peer.pull(RequestKey(9, "m"), target)


def test_push(far, processes, open_node: OpenNode):
    node = open_node()
    source = node.allocate(**BLOCKS)
    paint(source, plus=10_000)
    peer = node.connect(far.address)
    peer.push("kv", source, [1], [0])
    peer.push("kv", source, [5])
    peer.push("kv", source, [2], [3], layers=range(2, 3), dst_layers=range(1, 2))
    data = [torch.frombuffer(each, dtype=torch.int32) for each in map(bytearray, far.call("data"))]
    firsts = [tensor.view(6, 8)[:, 0].tolist() for tensor in data]
    assert firsts[0] == [10_001, 1, 2, 3, 4, 10_005]
    assert firsts[2] == [10_201, 201, 202, 10_402, 204, 10_205]
    other = processes()
    address = other.call("open")
    cache_id = other.call("allocate", **ROWS)
    rows = node.allocate(**ROWS)
    paint(rows, plus=10_000)
    node.connect(address).push(RowKey(cache_id, 2), rows, row=1)
    assert other.call("data")[1][64:] == rows.tensors[1][1].cpu().numpy().tobytes()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p, b, r: p.pull(7.5, b), TypeError, "key"),
        (lambda p, b, r: p.pull("kv", None), TypeError, "into"),
        (lambda p, b, r: p.pull("kv", b, row=1), LLMParamError, "blocks cache"),
        (lambda p, b, r: p.pull(RowKey(1), r, [0]), LLMParamError, "contiguous"),
        (lambda p, b, r: p.pull(RowKey(1), b, [0], [0]), LLMParamError, "cut in order"),
        (lambda p, b, r: p.pull("kv", b, [0, 1], [0]), LLMParamError, "2 src_blocks for 1"),
        (lambda p, b, r: p.pull("kv", b, [99], [0]), LLMParamError, "99"),
        (lambda p, b, r: p.pull("kv", b, [0.5]), TypeError, "src_blocks"),
        (lambda p, b, r: p.pull("kv", r), LLMParamError, "into is a contiguous"),
        (lambda p, b, r: p.pull("other", b), ld.LLMCacheNotFoundError, None),
        (lambda p, b, r: p.pull("kv", b, timeout_s=-1), LLMParamError, "timeout_s"),
        (lambda p, b, r: p.pull("kv", b, layers=range(3, 4)), LLMParamError, None),
        (lambda p, b, r: p.push(RowKey(1), b), LLMParamError, "push blocks to a name"),
        (lambda p, b, r: p.push("kv", r), LLMParamError, "a row to a RowKey"),
        (lambda p, b, r: p.pull_layers("kv", b, layers=range(4)), LLMParamError, "within"),
        (lambda p, b, r: p.push_layers("kv", r), LLMParamError, "RowKey"),
    ],
)
def test_wrong_transfers(call, error, text, far, open_node: OpenNode):
    node = open_node()
    peer = node.connect(far.address)
    blocks, rows = node.allocate(**BLOCKS), node.allocate(**ROWS)
    paint(blocks, plus=10_000)
    before = values(blocks)
    with pytest.raises(error, match=text):
        call(peer, blocks, rows)
    assert values(blocks) == before


def test_prepared_transfers(far, open_node: OpenNode):
    node = open_node()
    target, source = node.allocate(**BLOCKS), node.allocate(**BLOCKS)
    peer = node.connect(far.address)
    blocks = torch.tensor([1, 2])
    pull = peer.prepare_pull("kv", target, blocks, [3, 4], layers=range(1))
    blocks.zero_()  # it has its own by now
    for plus in (10_000, 20_000):
        paint(source, plus=plus)
        peer.prepare_push("kv", source, [1, 2]).run()
        paint(target)
        pull.run()
        assert values(target)[0] == [0, 1, 2, plus + 1, plus + 2, 5]
        assert values(target)[2] == [200, 201, 202, 203, 204, 205]
    assert pull.start().synchronize() == ld.LLMStatusCode.LLM_SUCCESS
    with pytest.raises(LLMParamError, match="timeout_s"):
        pull.run(timeout_s=0)


# -- when things end ------------------------------------------------------------------------------


def test_a_peer_that_dies(far, open_node: OpenNode):
    node = open_node()
    target = node.allocate(**BLOCKS)
    peer = node.connect(far.address)
    peer.pull("kv", target)
    far.kill()
    with pytest.raises(ld.LLMException) as caught:
        peer.pull("kv", target)
    assert isinstance(caught.value, (ld.LLMNotLinkedError, ld.LLMTimeoutError))
    peer.disconnect(force=True)


def test_a_closed_node(far, open_node: OpenNode):
    node = open_node()
    target = node.allocate(**BLOCKS)
    peer = node.connect(far.address)
    tensor = target.tensors[0]
    node.close()
    assert tensor.shape == (6, 4, 2)
    assert target.ended
    assert "closed" in repr(peer)
    with pytest.raises(RuntimeError):
        peer.pull("kv", target)


def test_a_peer_keeps_its_node(far):
    peer = ld.open(cluster_id=2).connect(far.address)
    assert peer.link.state == "linked"
    peer._node.close()


def test_a_number_names_a_cache_as_a_text_does(far, open_node: OpenNode):
    far.call("allocate", name=7, **BLOCKS)
    node = open_node(cluster_id=2)
    target = node.allocate(**BLOCKS)
    node.connect(far.address).pull(7, into=target)
    there = far.call("data")
    assert [tensor.cpu().numpy().tobytes() for tensor in target.tensors] == there

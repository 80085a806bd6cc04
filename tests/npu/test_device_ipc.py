# SPDX-License-Identifier: Apache-2.0
"""Device memory that another process has open by AscendCL's keys: who opens it, when it ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, Placement
from llm_datadist_torch.transports.local.ipc import probe
from tests.npu.hixl_pair import KEY, OK, Pair, blocks, give, here, pair, peers, pull
from tests.npu.npu_service import NpuService
from tests.peers import Peer, Ref, eventually
from tests.transfer.remote import messages

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_simulated_npu

LOCAL = {"ipc": True, "options": {"llm.Transport": "local"}}
POOL = '{"memory_size": 8388608, "page_shift": 12}'


def of(*cases: dict, ids: list[str] | None = None):
    return pytest.mark.parametrize("pair", [LOCAL | case for case in cases], indirect=True, ids=ids)


def give_late(there: Peer, number: int, rows: int = 8, row_bytes: int = 4096) -> BlocksCacheKey:
    key = BlocksCacheKey(2, number)
    there.call("allocate", str(number), 2, rows, row_bytes, paged=True, keys=key)
    there.call("paint", str(number), number)
    return key


@of({}, {"remote": True}, {"pool": POOL}, ids=["two-sided", "remote", "pool"])
def test_an_allocation_is_exported_and_opened_once(pair: Pair):
    here, there, _ = pair
    source = blocks(give(pair), 8, 4096)
    for order in (range(8), range(7, -1, -1)):
        assert pull(here, order, range(8)) is None
        mine = blocks(here.dump("mine"), 8, 4096)
        assert mine == [[tensor[row] for row in order] for tensor in source]
    assert here.attempt("push_blocks", KEY, Ref("mine"), [0], [7]) is None
    assert here.paths() == {"device-ipc"}
    assert here.transports(2) == ("local", "local")
    assert here.reason(2) == "same host, AscendCL's IPC"
    assert here.calls("aclrtIpcMemImportByKey") == 1
    assert there.call("calls", "aclrtIpcMemGetExportKey") == 1
    assert there.call("calls", "aclrtIpcMemSetImportPid") == 1


@of({"remote": True, "pool": POOL}, ids=["pool"])
def test_keys_are_asked_for_once(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Further caches in the same allocation cost no message more than any other way."""
    here, there, _ = pair
    give(pair)
    late = give_late(there, 3)
    with messages(monkeypatch) as said:  # without the first call for keys
        for key in (KEY, KEY, late):
            assert pull(here, [3], [0], key) is None
    assert said == ["Resolve", "Release"] * 3
    assert here.rows("mine")[0][0] == 3
    assert here.paths() == {"device-ipc"}


@of({}, ids=["local"])
def test_host_memory_needs_no_keys(pair: Pair):
    here, there, _ = pair
    host = {"paged": True, "placement": Placement.HOST}
    there.call("allocate", "theirs", 2, 8, 4096, keys=KEY, **host)
    there.call("paint", "theirs", 9)
    here.allocate("mine", 2, 8, 4096, **host)
    here.paint("mine", 0)
    assert pull(here, [0], [1]) is None
    assert here.rows("mine") == [[0, 9, 0, 0, 0, 0, 0, 0]] * 2
    assert here.paths() == {"process-memory"}
    assert here.calls("aclrtDeviceGetBareTgid") == 0
    assert there.call("calls", "aclrtIpcMemGetExportKey") == 0


def test_before_an_engine_where_there_is_one(here: NpuService, peers: Callable[[], Peer]):
    there = peers()
    port = there.call("start", 2, ipc=True)
    here.start(1, ipc=True)
    assert here.link(2, port) == OK
    assert here.transports(2) == ("local", "local")
    give((here, there, port))
    assert pull(here) is None
    assert here.paths() == {"device-ipc"}


@of({}, ids=["local"])
def test_many_blocks_go_in_few_calls(pair: Pair):
    here, _, _ = pair
    data = blocks(give(pair, 64, 512), 64, 512)
    before = here.calls("aclrtMemcpyAsync")
    assert pull(here, range(64), range(64)) is None
    assert here.calls("aclrtMemcpyAsync") - before == 2  # a run in each of two tensors
    assert blocks(here.dump("mine"), 64, 512) == data


@of({}, ids=["local"])
def test_between_host_and_device_memory(pair: Pair):
    here, there, _ = pair
    there.call("allocate", "host", 2, 4, 1000, paged=True, keys=KEY, placement=Placement.HOST)
    there.call("paint", "host", 9)
    late = give_late(there, 7, 4, 1000)
    here.allocate("mine", 2, 4, 1000, paged=True)
    here.allocate("ours", 2, 4, 1000, paged=True, placement=Placement.HOST)
    here.paint("mine", 1)
    here.paint("ours", 2)
    assert pull(here, [0, 1], [3, 0]) is None
    assert here.rows("mine") == [[9, 1, 1, 9]] * 2
    assert here.attempt("push_blocks", KEY, Ref("mine"), [1], [2]) is None
    assert there.call("rows", "host") == [[9, 9, 1, 9]] * 2
    assert here.attempt("pull_blocks", late, Ref("ours"), [0], [3]) is None
    assert here.rows("ours") == [[2, 2, 2, 7]] * 2
    assert here.attempt("push_blocks", late, Ref("ours"), [0], [1]) is None
    assert there.call("rows", "7") == [[7, 2, 7, 7]] * 2
    assert here.paths() == {"process-memory", "device-ipc"}


@of({}, {"remote": True}, ids=["two-sided", "remote"])
def test_memory_is_freed_when_nobody_has_it_open_any_more(pair: Pair):
    here, there, _ = pair
    give(pair)
    before = there.call("empty_cache")
    late = give_late(there, 3, 8, 1 << 20)
    here.allocate("large", 2, 8, 1 << 20, paged=True)
    assert here.attempt("pull_blocks", late, Ref("large"), [0], [0]) is None
    assert there.call("exported") > 16 << 20
    there.call("drop", "3")
    assert eventually(lambda: there.call("exported") == 0)
    assert here.calls("aclrtIpcMemClose") == 1
    assert eventually(lambda: there.call("empty_cache") == before)
    assert pull(here) is None
    assert there.call("exported") > 0


@of({}, ids=["local"])
def test_what_was_registered_by_addresses_is_closed_when_unregistering_returns(pair: Pair):
    here, there, _ = pair
    there.call("adopt_addresses", "theirs", 2, 8, 4096, KEY)
    there.call("paint", "theirs", 4)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 0)
    assert pull(here) is None
    assert here.rows("mine") == [[0, 0, 0, 0, 0, 4, 4, 4]] * 2
    assert here.paths() == {"device-ipc"}
    there.call("drop", "theirs")
    assert there.call("exported") == 0
    assert here.calls("aclrtIpcMemClose") == 1


@of({}, ids=["local"])
def test_the_end_of_a_link_closes_what_was_open(pair: Pair):
    here, there, port = pair
    give(pair)
    assert pull(here) is None
    assert here.unlink(2, port) == OK
    assert here.calls("aclrtIpcMemClose") == 1
    there.call("drop", "theirs")
    assert eventually(lambda: there.call("exported") == 0)
    assert here.link(2, port) == OK
    assert pull(here, [0], [0], give_late(there, 5)) is None


def start_reader(here: NpuService, peers: Callable[[], Peer]) -> Peer:
    """A further process, instance 3, that has a cache of `here` open."""
    reader = peers()
    reader.call("start", 3, **LOCAL)
    assert reader.call("link", 1, here.dd.listen_address[1]) == OK
    reader.call("allocate", "mine", 2, 8, 4096, paged=True)
    pulled = reader.call("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("mine"), [0], [0])
    assert pulled is None
    return reader


@of({}, {"pool": POOL}, ids=["local", "pool"])
def test_the_end_of_an_instance_ends_its_exports(pair: Pair, peers: Callable[[], Peer]):
    here, _, _ = pair
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    start_reader(here, peers)
    assert here.exported() > 0
    here.finish()
    assert eventually(lambda: here.exported() == 0)


def pidfds() -> int:
    """How many descriptors of processes this process has."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            count += "pidfd" in str(entry.readlink())
    return count


@of({}, ids=["local"])
def test_a_reader_that_is_killed_has_nothing_open(pair: Pair, peers: Callable[[], Peer]):
    here, _, _ = pair
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 6)
    reader = start_reader(here, peers)
    assert here.exported() > 0
    reader.kill()
    here.drop("ours")
    assert eventually(lambda: here.exported() == 0)


@of({}, ids=["local"])
def test_no_descriptor_is_kept_of_readers_that_are_gone(pair: Pair, peers: Callable[[], Peer]):
    """Also while the cache that they had open lives on."""
    here, _, _ = pair
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))

    before = pidfds()
    for _ in range(2):
        start_reader(here, peers).kill()
        assert eventually(lambda: here.link_states()[3] == "lost")
        assert here.unlink(3, force=True) == OK
    assert eventually(lambda: pidfds() == before), (before, pidfds())
    assert here.exported() > 0


@of({}, ids=["local"])
def test_memory_that_is_open_is_shared_again(pair: Pair, peers: Callable[[], Peer]):
    """A reader that does not close what has ended makes nobody wait or go another way."""
    here, there, _ = pair
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    there.call("allocate", "mine", 2, 8, 4096, paged=True)
    reader = start_reader(here, peers)
    size = here.exported()
    late = BlocksCacheKey(1, 1)
    with reader.stopped():
        here.drop("ours")
        assert here.exported() == size
        here.allocate("again", 2, 8, 4096, paged=True, keys=late)
        here.paint("again", 7)
        assert there.call("attempt", "pull_blocks", late, Ref("mine"), [0], [1]) is None
        assert there.call("rows", "mine")[0][1] == 7
        assert here.exported() == size
        assert here.calls("aclrtIpcMemGetExportKey") == 1
    assert reader.call("attempt", "pull_blocks", late, Ref("mine"), [0], [1]) is None
    assert reader.call("rows", "mine")[0][1] == 7
    assert there.call("paths") == reader.call("paths") == {"device-ipc"}
    here.drop("again")
    assert eventually(lambda: here.exported() == 0)


@of({}, ids=["local"])
def test_unregistering_waits_for_readers_as_long_as_it_is_told(
    pair: Pair, peers: Callable[[], Peer], caplog: pytest.LogCaptureFixture
):
    here, _, _ = pair
    here.adopt_addresses("ours", 2, 8, 4096, BlocksCacheKey(1, 0))
    reader = start_reader(here, peers)
    with reader.stopped():
        here.manager.unregister_cache(here.held["ours"].cache.cache_id, timeout=200)
        (said,) = [text for text in caplog.messages if "stay open in another process" in text]
        assert "after 200 ms; keep that memory" in said
        assert here.exported() > 0
    assert eventually(lambda: here.exported() == 0)


@of({}, ids=["local"])
def test_expandable_segments_go_another_way(pair: Pair, caplog: pytest.LogCaptureFixture):
    here, there, _ = pair
    there.call("expandable", on=True)
    there.call("adopt", "theirs", 2, 8, 4096, KEY)
    there.call("paint", "theirs", 5)
    there.call("expandable", on=False)
    here.allocate("mine", 2, 8, 4096, paged=True)
    for _ in range(2):
        here.paint("mine", 0)
        assert pull(here, [0, 1], [2, 3]) is None
        assert here.rows("mine") == [[0, 0, 5, 5, 0, 0, 0, 0]] * 2
    assert here.paths() == {"relay"}
    (said,) = [text for text in caplog.messages if "expandable" in text]
    assert "set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False" in said
    # What this library allocates there is not in one.
    assert pull(here, [0], [0], give_late(there, 3)) is None
    assert here.paths() == {"relay", "device-ipc"}


@of({}, ids=["local"])
def test_opening_fails(pair: Pair):
    here, there, _ = pair
    give(pair)
    here.break_("aclrtIpcMemImportByKey", 507022)
    assert pull(here) is None
    assert here.paths() == {"relay"}
    there.call("drop", "theirs")
    assert eventually(lambda: there.call("exported") == 0)
    assert pull(here, [0], [0], give_late(there, 4)) is None
    assert here.paths() == {"relay", "device-ipc"}


@pytest.mark.parametrize("pair", [{"ipc": False, "options": LOCAL["options"]}], indirect=True)
def test_a_runtime_without_the_functions(pair: Pair):
    here, _, _ = pair
    give(pair)
    assert pull(here) is None
    assert here.paths() == {"relay"}
    assert "has no aclrtIpcMemGetExportKey" in here.reason(2)


@pytest.mark.needs_two_npus
@of({}, ids=["local"])
def test_between_two_devices(pair: Pair, peers: Callable[[], Peer]):
    here, _, _ = pair
    other = peers()
    options = LOCAL["options"] | {"ge.exec.deviceId": "1"}
    port = other.call("start", 3, ipc=True, options=options)
    assert here.link(3, port) == OK
    key = BlocksCacheKey(3, 0)
    other.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=key)
    assert other.call("device", "theirs") == "npu:1"
    source = blocks(other.call("fill", "theirs", 4), 8, 4096)
    here.allocate("mine", 2, 8, 4096, paged=True)
    order = random.Random(1).sample(range(8), 8)
    assert pull(here, order, range(8), key) is None
    assert blocks(here.dump("mine"), 8, 4096) == [[t[row] for row in order] for t in source]
    assert here.attempt("push_blocks", key, Ref("mine"), [0], [7]) is None
    assert here.paths() == {"device-ipc"}


def test_what_doctor_tells_of_this_machine(device: torch.device):
    assert probe.look(device) == ("", "for the processes that are named to it", [])
    assert probe.look(torch.device("cpu")) == ("its device memory is host memory", "", [])

# SPDX-License-Identifier: Apache-2.0
"""The names, signatures, values and argument checks of the simulated module ``hixl``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.hixl_peers import Peer, free_name
from tests.simulated import ROOT, environment

pytestmark = pytest.mark.needs_torch_npu

NUMBERS = {
    "SUCCESS": 0,
    "PARAM_INVALID": 103900,
    "TIMEOUT": 103901,
    "NOT_CONNECTED": 103902,
    "ALREADY_CONNECTED": 103903,
    "NOTIFY_FAILED": 103904,
    "UNSUPPORTED": 103905,
    "FAILED": 503900,
    "RESOURCE_EXHAUSTED": 203900,
    "FEATURE_NOT_SUPPORTED": 0,
    "FEATURE_SUPPORTED": 1,
}

OPTIONS = {
    "OPTION_ENABLE_USE_FABRIC_MEM": "EnableUseFabricMem",
    "OPTION_RDMA_TRAFFIC_CLASS": "RdmaTrafficClass",
    "OPTION_RDMA_SERVICE_LEVEL": "RdmaServiceLevel",
    "OPTION_BUFFER_POOL": "BufferPool",
    "OPTION_GLOBAL_RESOURCE_CONFIG": "GlobalResourceConfig",
    "OPTION_AUTO_CONNECT": "AutoConnect",
    "OPTION_LOCAL_COMM_RES": "LocalCommRes",
}

ENUMS = {
    "MemType": ["MEM_DEVICE", "MEM_HOST"],
    "TransferOp": ["READ", "WRITE"],
    "TransferStatus": ["WAITING", "COMPLETED", "TIMEOUT", "FAILED"],
    "AsyncConnectStatus": [
        "NOT_CONNECT",
        "CONNECT_PENDING",
        "CONNECTING",
        "CONNECTED",
        "CONNECT_FAILED",
        "DISCONNECT_PENDING",
        "DISCONNECTING",
    ],
    "FeatureType": ["AUTO_CONNECT", "CLIENT_SERVER_COMM"],
}


@pytest.fixture(scope="module")
def shared_peer():
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def peer(shared_peer):
    yield shared_peer
    shared_peer("reset()")


def test_import_needs_the_simulator():
    modules = str(ROOT / "src" / "ascend_sim" / "modules")
    code = f"import sys; sys.path.insert(0, {modules!r}); import hixl"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert done.returncode == 1
    assert "python -m ascend_sim" in done.stderr


def test_names_and_numbers(peer):
    assert peer("{name: getattr(hixl, name) for name in names}", names=list(NUMBERS)) == NUMBERS
    assert peer("[type(getattr(hixl, n)) is int for n in names]", names=list(NUMBERS)) == [
        True for _ in NUMBERS
    ]
    assert peer("{name: getattr(hixl, name) for name in names}", names=list(OPTIONS)) == OPTIONS
    assert peer("{e: [m.name for m in getattr(hixl, e)] for e in es}", es=list(ENUMS)) == ENUMS
    assert peer("hixl.READ, hixl.WRITE, hixl.MEM_DEVICE, hixl.MEM_HOST") == (
        "READ",
        "WRITE",
        "MEM_DEVICE",
        "MEM_HOST",
    )


def test_value_objects(peer):
    assert peer("d = hixl.MemDesc(1, 2); d.len = 5; d.addr, d.len") == (1, 5)
    assert peer("d = hixl.TransferOpDesc(1, 2, 3); d.local_addr, d.remote_addr, d.len") == (1, 2, 3)
    assert peer("d = hixl.NotifyDesc('a', 'b'); d.name, d.notify_msg") == ("a", "b")
    assert peer("d = hixl.TransferArgs(); d.user_data = 9; d.user_data") == 9
    assert peer("d = hixl.GetTransferStatusArgs(); d.max_query_count, d.skip_waiting") == (
        2**32 - 1,
        False,
    )


@pytest.mark.parametrize(
    "code",
    [
        "hixl.MemDesc(-1, 2)",
        "hixl.MemDesc(2**64, 2)",
        "hixl.MemDesc(1.0, 2)",
        "hixl.MemDesc(1)",
        "hixl.NotifyDesc('a', b'b')",
        "hixl.TransferArgs(1)",
        "hixl.Hixl().initialize(5)",
        "hixl.Hixl().initialize('127.0.0.1', {'AutoConnect': 1})",
        "hixl.Hixl().initialize('127.0.0.1', None)",
        "hixl.Hixl().connect('127.0.0.1:5', 1.5)",
        "hixl.Hixl().connect('127.0.0.1:5', 2**31)",
        "hixl.Hixl().register_mem((1, 2), hixl.MEM_HOST)",
        "hixl.Hixl().register_mem(hixl.MemDesc(1, 2), 1)",
        "hixl.Hixl().transfer_sync('127.0.0.1:5', 0, [])",
        "hixl.Hixl().transfer_sync('127.0.0.1:5', hixl.READ, [(1, 2, 3)])",
        "hixl.Hixl().transfer_sync('127.0.0.1:5', hixl.READ, 5)",
        "hixl.Hixl().get_transfer_status(None)",
        "hixl.Hixl().get_all_transfer_status()",
        "hixl.get_capability(0)",
    ],
)
def test_wrong_types_are_type_errors(peer, code):
    with pytest.raises(AssertionError, match="TypeError"):
        peer(code)


def test_unknown_attributes_are_refused(peer):
    with pytest.raises(AssertionError, match="AttributeError"):
        peer("hixl.TransferArgs().userdata = 5")


def test_capabilities(peer):
    assert peer("[hixl.get_capability(f) for f in hixl.FeatureType]") == [(0, 1), (0, 1)]


FAILING_CALLS = [
    ("register_mem(hixl.MemDesc(4096, 1), hixl.MEM_HOST)", (503900, 0)),
    ("deregister_mem(1)", 503900),
    ("connect('127.0.0.1:5')", 503900),
    ("connect_async('127.0.0.1:5')", 503900),
    ("disconnect('127.0.0.1:5')", 503900),
    ("disconnect_async('127.0.0.1:5')", 503900),
    ("get_async_connect_status('127.0.0.1:5')", (503900, "NOT_CONNECT")),
    ("get_all_async_connect_status()", (503900, {})),
    ("transfer_sync('127.0.0.1:5', hixl.READ, descs((1, 1, 1)))", 503900),
    ("transfer_async('127.0.0.1:5', hixl.READ, descs((1, 1, 1)))", (503900, 0)),
    ("get_transfer_status(1)", (503900, "FAILED")),
    ("get_all_transfer_status(hixl.GetTransferStatusArgs())", (503900, [])),
    ("send_notify('127.0.0.1:5', hixl.NotifyDesc('a', 'b'))", 503900),
    ("get_notifies()", (503900, [])),
]


@pytest.mark.parametrize(
    ("call", "answer"), FAILING_CALLS, ids=[c.split("(")[0] for c, _ in FAILING_CALLS]
)
def test_calls_that_fail_outside_their_time_and_thread(peer, call, answer):
    assert peer(f"hixl.Hixl().{call}") == answer, "before initialize"
    name = free_name()
    assert peer(f"e = engine(name); in_thread(lambda: e.{call})", name=name) == answer, "no device"
    assert peer(f"in_thread(lambda: e.{call}, device=1)") == answer, "another context"
    assert peer(f"e.finalize(); e.{call}") == answer, "after finalize"
    assert peer("e.finalize()") is None


def test_threads_with_the_same_context(peer):
    peer("e = engine('127.0.0.1'); m = Host(bytes(8)); d = hixl.MemDesc(m.addr, 8)")
    assert peer("in_thread(lambda: e.register_mem(d, hixl.MEM_HOST)[0], device=0)") == 0


def test_initialize(peer):
    name = free_name()
    assert peer("e = hixl.Hixl(); in_thread(lambda: e.initialize(name))", name=name) == 503900
    assert peer("e.initialize(name), e.initialize('nonsense')") == (0, 0), "repeated: ignored"
    assert peer("hixl.Hixl().initialize(name)") == 503900, "the port is taken"
    assert peer("e.finalize(); e.initialize(name)") == 0
    assert peer("e.finalize()") is None
    assert peer("[engine(n).finalize() for n in ('127.0.0.1', '127.0.0.1:0', '[::1]')]") == [
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "name", ["", "127.0.0.1:65536", "127.0.0.1:x", "localhost:5000", "::1", "[127.0.0.1]:5000"]
)
def test_bad_engine_names(peer, name):
    assert peer("hixl.Hixl().initialize(name)", name=name) == 103900
    assert peer("engine('127.0.0.1').connect(name)", name=name) == 103900


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("EnableUseFabricMem", ["0", "1"], ["", "2", "true"]),
        ("AutoConnect", ["0", "1"], ["yes"]),
        ("BufferPool", ["4:8", "0:0"], ["", "4", "4:0", "0:8", "-1:8", "4:8:1"]),
        ("RdmaTrafficClass", ["0", "132"], ["-1", "256", "x", "130"]),
        ("RdmaServiceLevel", ["0", "7"], ["8"]),
        ("LocalCommRes", ["", '{"version": "1.3"}', '{"version": "1.0"}'], ["{", "[]"]),
        (
            "GlobalResourceConfig",
            ["", "{}", '{"channel_pool.max_channel": 5}', '{"connect_pool": {"thread_num": 2}}'],
            ["nonsense", '{"a": 1}', '{"connect_pool": {"threads": 2}}', '{"channel_pool.a": 1}'],
        ),
        ("Unknown", [], [""]),
    ],
)
def test_options(peer, key, good, bad):
    code = "e = hixl.Hixl(); s = e.initialize('127.0.0.1', {key: text}); e.finalize(); s"
    assert [peer(code, key=key, text=text) for text in good] == [0 for _ in good]
    assert [peer(code, key=key, text=text) for text in bad] == [103900 for _ in bad]


def test_register(peer):
    peer("e = engine('127.0.0.1'); m = Host(bytes(64)); kind = hixl.MEM_HOST")
    register = "e.register_mem(hixl.MemDesc(m.addr + first, length), kind)"
    status, handle = peer(register, first=0, length=48)
    assert status == 0
    assert peer(register, first=0, length=48) == (0, handle), "the same range, the same handle"
    for first, length in [(0, 47), (8, 8), (40, 24), (0, 64)]:
        assert peer(register, first=first, length=length) == (103900, 0), "a part in common"
    status, other = peer(register, first=48, length=16)
    assert status == 0
    assert other != handle
    assert peer("e.deregister_mem(h)", h=handle) == 0
    assert peer("e.deregister_mem(h)", h=handle) == 103900, "unknown by now"
    assert peer(register, first=0, length=47)[0] == 0


@pytest.mark.parametrize(
    ("addr", "length", "kind", "status"),
    [
        ("0", 8, "MEM_HOST", 103900),
        ("m.addr", 0, "MEM_HOST", 103900),
        ("2**64 - 8", 9, "MEM_HOST", 103900),
        ("4096", 8, "MEM_HOST", 503900),
        ("m.addr", 2**40, "MEM_HOST", 503900),
        ("m.addr", 64, "MEM_DEVICE", 503900),
    ],
)
def test_register_refuses(peer, addr, length, kind, status):
    peer("e = engine('127.0.0.1'); m = Host(bytes(64))")
    code = f"e.register_mem(hixl.MemDesc({addr}, length), hixl.MemType[kind])"
    assert peer(code, length=length, kind=kind) == (status, 0)


def test_ranges_are_limited(peer):
    code = """
    m = Host(bytes(8 * 4097)); e = engine('127.0.0.1')
    every = [hixl.MemDesc(m.addr + 8 * i, 8) for i in range(4097)]
    [e.register_mem(one, hixl.MEM_HOST)[0] for one in every]
    """
    assert peer(code) == [0] * 4096 + [503900]


def test_unaligned_device_memory_is_warned_of_once(peer):
    code = """
    d = Device(bytes(8192)); e = engine('127.0.0.1'); said = []
    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    log = logging.getLogger('hixl'); log.setLevel('WARNING'); log.addHandler(listener := Listener())
    for first in (512, 1024):
        assert e.register_mem(hixl.MemDesc(d.addr + first, 512), hixl.MEM_DEVICE)[0] == 0
    log.setLevel('NOTSET'); log.removeHandler(listener)
    len(said), '2 MiB' in said[0]
    """
    assert peer(code) == (1, True)

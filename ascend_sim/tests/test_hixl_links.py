# SPDX-License-Identifier: Apache-2.0
"""Links of the simulated module ``hixl``: connect, disconnect, what ends them, and notifies."""

from __future__ import annotations

import socket

import pytest

from tests.hixl_peers import Peer, free_name, pattern, peers

pytestmark = pytest.mark.needs_torch_npu

SIZE = 8192


@pytest.fixture(scope="module")
def processes():
    with peers() as both:
        yield both


@pytest.fixture
def here(processes):
    yield processes[0]
    processes[0]("reset()")


@pytest.fixture
def there(processes):
    yield processes[1]
    processes[1]("reset()")


@pytest.fixture
def victim():
    """A process that a test may kill."""
    peer = Peer()
    yield peer
    peer.kill()


def serve(peer, name=None):
    """An engine with a registered buffer; its name and the buffer's address."""
    name = name or free_name()
    code = "e = engine(name); m = Host(data); register(e, m); m.addr"
    return name, peer(code, name=name, data=pattern(1, SIZE))


def client(peer, **options):
    code = "e = engine('127.0.0.1', **options); m = Host(bytes(SIZE)); register(e, m)"
    peer(code, options=options, SIZE=SIZE)


READ = "e.transfer_sync(remote, hixl.READ, descs((m.addr, far, SIZE)))"
BEGIN = "s, r = e.transfer_async(remote, hixl.READ, descs((m.addr, far, SIZE)))"


def test_connect_and_disconnect(here, there):
    remote, far = serve(there)
    client(here)
    assert here(READ, remote=remote, far=far) == 103902
    assert here("e.transfer_async(remote, hixl.READ, descs((m.addr, far, 8)))") == (103902, 0)
    assert here("e.disconnect(remote)") == 103902
    assert here("e.connect(remote)") == 0
    assert here("e.connect(remote)") == 103903
    assert here("e.connect_async(remote)") == 103903
    assert here(READ) == 0
    assert here("e.disconnect(remote)") == 0
    assert here(READ) == 103902
    assert here(f"e.connect(remote), {READ}") == (0, 0)


def test_links_have_one_direction(here, there):
    remote, far = serve(there)
    back, _ = serve(here)
    assert here("e.connect(remote)", remote=remote) == 0
    read_back = "e.transfer_sync(back, hixl.READ, descs((m.addr, far, 8)))"
    assert there(read_back, back=back, far=here("m.addr")) == 103902
    assert there(f"e.connect(back), {read_back}") == (0, 0)
    assert there("e.disconnect(back)") == 0
    assert here(READ, far=far, SIZE=SIZE) == 0, "the other direction stays"


@pytest.mark.needs_ipv6
def test_ipv6_and_spelling(here, there):
    remote, far = serve(there, free_name("::1"))
    client(here)
    assert here("e.connect(remote)", remote=remote.replace("::1", "0::1")) == 503900
    assert here(f"e.connect(remote), {READ}", remote=remote, far=far) == (0, 0)


def test_nobody_there(here):
    client(here)
    assert here("e.connect(remote)", remote=free_name()) == 503900
    assert here("e.connect('127.0.0.1')") == 103900, "an engine without a port is a client"
    assert here("e.connect('127.0.0.1:0')") == 103900


def test_somebody_else_there(here):
    """Silence costs the time limit; what speaks another protocol is refused."""
    client(here)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        remote = "{}:{}".format(*silent.getsockname())
        assert here("e.connect(remote, 200)", remote=remote) == 103901
    with socket.create_server(("127.0.0.1", 0)) as other:
        remote = "{}:{}".format(*other.getsockname())
        here.begin("e.connect(remote, 20000)", remote=remote)
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
            assert here.answer() == 503900


def test_server_survives_nonsense(here, there):
    remote, far = serve(there)
    host, port = remote.split(":")
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b"\0\0\0\2{}", b"\xff" * 4096):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(nonsense)
    client(here)
    assert here(f"e.connect(remote), {READ}", remote=remote, far=far) == (0, 0)


@pytest.mark.parametrize("limit", [0, -5])
def test_time_limits_must_be_positive(here, limit):
    client(here)
    for call in ("connect", "connect_async", "disconnect", "disconnect_async"):
        assert here(f"e.{call}('127.0.0.1:5', limit)", limit=limit) == 103900
        assert here(f"e.{call}('127.0.0.1:5', timeout_in_millis=limit)") == 103900
    assert here("e.transfer_sync('127.0.0.1:5', hixl.READ, descs((1, 1, 1)), limit)") == 103900
    assert here("e.send_notify('127.0.0.1:5', hixl.NotifyDesc('a', 'b'), limit)") == 103900


def test_in_the_background(here, there):
    remote, far = serve(there)
    client(here)
    dead = free_name()
    status = "e.get_async_connect_status"
    assert here(f"{status}(remote)", remote=remote, dead=dead) == (0, "NOT_CONNECT")
    assert here("e.connect_async(remote), e.connect_async(dead)") == (0, 0)
    done = "eventually(lambda: 'ING' not in {}(remote)[1].name)"
    assert here(done.format(status))
    assert here(f"eventually(lambda: {status}(dead)[1] is hixl.AsyncConnectStatus.CONNECT_FAILED)")
    assert here("e.get_all_async_connect_status()") == (
        0,
        {remote: "CONNECTED", dead: "CONNECT_FAILED"},
    )
    assert here(READ, far=far) == 0
    assert here("e.disconnect_async(dead)") == 103902
    assert here("e.disconnect_async(remote)") == 0
    assert here(f"eventually(lambda: {status}(remote)[1] is hixl.AsyncConnectStatus.NOT_CONNECT)")
    assert here(READ) == 103902


def test_connecting_is_seen(here):
    client(here)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        remote = "{}:{}".format(*silent.getsockname())
        assert here("e.connect_async(remote, 60000)", remote=remote) == 0
        state = "e.get_async_connect_status(remote)[1]"
        assert here(f"eventually(lambda: {state} is hixl.AsyncConnectStatus.CONNECTING)")
        assert here("e.connect(remote)") == 103903
    here(f"eventually(lambda: {state} is hixl.AsyncConnectStatus.CONNECT_FAILED)")


def test_peer_finalizes(here, there):
    remote, far = serve(there)
    client(here)
    assert here(f"e.connect(remote), {READ}", remote=remote, far=far) == (0, 0)
    here(BEGIN)
    there("e.finalize()")
    assert here("end_of(e, r)") == (0, "FAILED")
    assert here(READ) == 503900
    assert here("e.connect(remote)") == 103903, "a lost link stays until it is disconnected"
    assert here("e.disconnect(remote)") == 0
    assert here("e.connect(remote)") == 503900
    _, far = serve(there, remote)
    assert here(f"e.connect(remote), {READ}", far=far) == (0, 0)


def test_peer_is_killed(here, victim):
    remote, far = serve(victim)
    client(here)
    assert here("e.connect(remote)", remote=remote) == 0
    here(BEGIN, far=far)
    victim.kill()
    assert here("end_of(e, r)") == (0, "FAILED")
    assert here(f"{READ}, e.send_notify(remote, hixl.NotifyDesc('a', 'b'))") == (503900, 103904)
    assert here("e.disconnect(remote)") == 0


def test_a_stopped_peer_is_read_one_sidedly(here, there):
    remote, far = serve(there)
    client(here)
    assert here("e.connect(remote)", remote=remote) == 0
    with there.stopped():
        assert here(READ, far=far) == 0
        assert here("m.data") == pattern(1, SIZE)
        assert here("e.send_notify(remote, hixl.NotifyDesc('a', 'b'), 200)") == 103901
        assert here("e.disconnect(remote)") == 0
        assert here("e.connect(remote, 200)") == 103901


def test_auto_connect(here, there):
    remote, far = serve(there)
    client(here, AutoConnect="1")
    assert here(READ, remote=remote, far=far) == 0
    assert here("m.data") == pattern(1, SIZE)
    assert here("e.get_async_connect_status(remote)") == (0, "CONNECTED")
    assert here(READ, remote=free_name()) == 503900


def test_auto_connect_of_many_threads(here, there):
    remote, far = serve(there)
    client(here, AutoConnect="1")
    code = f"""
    results = []
    def one():
        runtime.aclrtSetDevice(0)
        results.append({READ})
    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    results
    """
    assert here(code, remote=remote, far=far) == [0] * 8


def test_heartbeat_drops_dead_links(here, there):
    assert here("engine_limit('heartbeat_ms', 50)") == 10_000
    client(here, AutoConnect="1")
    here("engine_limit('heartbeat_ms', 10_000)")
    remote, far = serve(there)
    assert here(READ, remote=remote, far=far) == 0
    there("e.finalize()")
    serve(there, remote)
    far = there("m.addr")
    assert here(f"eventually(lambda: {READ} == 0)", far=far)


def test_limit_of_links(here, there):
    assert here("engine_limit('links', 2)") == 512
    names = [free_name() for _ in range(3)]
    code = """
    runtime.aclrtSetDevice(1)
    others = [engine(name) for name in names]
    runtime.aclrtSetDevice(0)
    """
    there(code, names=names)
    connect = "[e.connect(name) for name in names]"
    client(here, LocalCommRes="")
    assert here(connect, names=names) == [0, 0, 203900]
    assert here("e.disconnect(names[0]), e.connect(names[2])") == (0, 0)
    client(here)
    assert here(connect) == [0, 0, 0]
    here("engine_limit('links', 512)")


def test_hccl_connects_no_engines_of_one_device(here, there):
    """That is the engine behind it where LocalCommRes says nothing, or of another version."""
    remote, far = serve(there)
    for resources in ("", '{"version": "1.2"}'):
        client(here, LocalCommRes=resources)
        assert here("e.connect(remote)", remote=remote) == 503900
    client(here, LocalCommRes="", EnableUseFabricMem="1")
    assert here(f"e.connect(remote), {READ}", far=far) == (0, 0)


def test_hccl_connects_engines_whose_processes_see_a_device_each(here):
    """Both call theirs device 0."""
    second = Peer(ASCEND_RT_VISIBLE_DEVICES="1")
    try:
        remote, far = serve(second)
        client(here, LocalCommRes="")
        assert here(f"e.connect(remote), {READ}", remote=remote, far=far) == (0, 0)
    finally:
        second.kill()


def test_connecting_takes_a_while(here, there):
    remote, _ = serve(there)
    client(here)
    assert here("e.connect(remote, 199), e.connect(remote, 200)", remote=remote) == (103901, 0)


def test_notifies(here, there):
    remote, _ = serve(there)
    client(here)
    assert here("e.send_notify(remote, hixl.NotifyDesc('a', 'b'))", remote=remote) == 103902
    here("e.connect(remote)")
    send = "e.send_notify(remote, hixl.NotifyDesc(name, text))"
    assert here(send, name="first", text="x" * 1024) == 0
    assert here(send, name="ä" * 1024, text="") == 0
    assert here(send, name="n", text="x" * 1025) == 103900
    assert here(send, name="n" * 1025, text="") == 103900
    got = "s, all = e.get_notifies(); s, [(n.name, n.notify_msg) for n in all]"
    assert there(got) == (0, [("first", "x" * 1024), ("ä" * 1024, "")])
    assert there(got) == (0, [])
    assert here("e.get_notifies()") == (0, [])


def test_unread_notifies_are_limited(here, there):
    remote, _ = serve(there)
    client(here)
    here("e.connect(remote); other = engine('127.0.0.1'); other.connect(remote)", remote=remote)
    send = "e.send_notify(remote, hixl.NotifyDesc('a', str(i)))"
    assert here(f"sum({send} for i in range(4096))") == 0
    assert here(f"i = 4096; {send}") == 103904
    assert here("other.send_notify(remote, hixl.NotifyDesc('b', ''))") == 0, "counted per link"
    assert there("s, all = e.get_notifies(); len(all), all[-1].name, all[4095].notify_msg") == (
        4097,
        "b",
        "4095",
    )
    assert here(send) == 0


def test_forked_child_may_not_use_the_engine(here):
    client(here)
    code = """
    import os
    pid = os.fork()
    if pid == 0:
        os._exit(e.get_notifies()[0] == hixl.FAILED)
    os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), e.get_notifies()[0]
    """
    assert here(code) == (1, 0)

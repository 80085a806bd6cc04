# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on purpose in the simulated module ``hixl``, and what it must look like then."""

from __future__ import annotations

import pytest

from tests.hixl_peers import Peer, free_name, pattern, peers

pytestmark = pytest.mark.needs_torch_npu

SIZE = 4 << 20

READ = "e.transfer_sync(remote, hixl.READ, descs((m.addr, far, SIZE)))"
WRITE = "e.transfer_sync(remote, hixl.WRITE, descs((m.addr, far, SIZE)))"
BEGIN = "s, r = e.transfer_async(remote, hixl.WRITE, descs((m.addr, far, SIZE))); s"


@pytest.fixture(scope="module")
def processes():
    with peers() as both:
        yield both


@pytest.fixture
def there(processes):
    yield processes[1]
    processes[1]("reset()")


@pytest.fixture
def here(processes, there):
    """Linked to `there`, with a buffer on each side."""
    peer = processes[0]
    link(peer, there)
    yield peer
    peer("reset()")


def link(near, far):
    name = free_name()
    code = "e = engine(name); m = Host(data); register(e, m); m.addr"
    addr = far(code, name=name, data=pattern(1, SIZE))
    code = "e = engine('127.0.0.1'); m = Host(data); register(e, m); e.connect(remote)"
    names = {"remote": name, "far": addr, "SIZE": SIZE}
    assert near(code, data=pattern(100, SIZE), **names) == 0


CALLS = [
    ("connect", "e.connect('127.0.0.1:5')", lambda code: code),
    ("connect_async", "e.connect_async('127.0.0.1:5')", lambda code: code),
    ("disconnect", "e.disconnect(remote)", lambda code: code),
    ("disconnect_async", "e.disconnect_async(remote)", lambda code: code),
    ("register_mem", "e.register_mem(hixl.MemDesc(m.addr, 8), hixl.MEM_HOST)", lambda c: (c, 0)),
    ("deregister_mem", "e.deregister_mem(1)", lambda code: code),
    ("transfer_sync", READ, lambda code: code),
    ("transfer_async", BEGIN, lambda code: code),
    ("get_transfer_status", "e.get_transfer_status(1)", lambda code: (code, "FAILED")),
    ("send_notify", "e.send_notify(remote, hixl.NotifyDesc('a', 'b'))", lambda code: code),
    ("get_notifies", "e.get_notifies()", lambda code: (code, [])),
    ("initialize", "hixl.Hixl().initialize('127.0.0.1')", lambda code: code),
]


@pytest.mark.parametrize(("name", "call", "answer"), CALLS, ids=[name for name, _, _ in CALLS])
def test_every_call_can_fail_once(here, name, call, answer):
    here("faults.fail(name, code=hixl.RESOURCE_EXHAUSTED)", name=f"hixl.{name}")
    assert here(call) == answer(203900)
    assert here(call) != answer(203900)


def test_the_third_call_fails(here):
    here("faults.fail('hixl.transfer_sync', 3, code=hixl.FAILED)")
    assert here(f"[{READ} for _ in range(4)]") == [0, 0, 503900, 0]


def test_faults_from_the_environment(there):
    name = free_name()
    there("e = engine(name)", name=name)
    peer = Peer(ASCEND_SIM_FAULTS="hixl.connect@1-2=103901")
    try:
        code = "e = engine('127.0.0.1'); [e.connect(remote) for _ in range(3)]"
        assert peer(code, remote=name) == [103901, 103901, 0]
    finally:
        peer.close()


def test_a_transfer_fails(here, there):
    here("faults.fail('hixl.move', code=hixl.FAILED, times=2)")
    assert here(WRITE) == 503900
    assert here(BEGIN) == 0
    assert here("end_of(e, r)") == (0, "FAILED")
    assert there("m.data") == pattern(1, SIZE)
    assert here(WRITE) == 0, "the link is fine"


def test_a_transfer_hangs_until_disconnect(here, there):
    here("faults.fail('hixl.move', code=hixl.TIMEOUT, times=2)")
    assert here(WRITE.replace("SIZE)))", "SIZE)), 100)")) == 103901
    assert here(BEGIN) == 0
    assert here("{e.get_transfer_status(r)[1].name for _ in range(50)} == {'WAITING'}")
    assert here("e.disconnect(remote), e.get_transfer_status(r)") == (0, (103900, "FAILED"))
    assert there("m.data") == pattern(1, SIZE)
    assert here(f"e.connect(remote), {WRITE}") == (0, 0)


def test_a_transfer_fails_half_way(here, there):
    here("faults.fail('hixl.step', 4, code=hixl.FAILED)")
    assert here(WRITE) == 503900
    written = 3 * (256 << 10)
    assert there("m.data") == pattern(100, SIZE)[:written] + pattern(1, SIZE)[written:]


def test_a_large_transfer_has_large_steps(here, there):
    """While another thread computes, each step waits for the GIL: there must not be thousands."""
    big = there("big = Host(bytes([5]) * (64 << 20)); register(e, big); big.addr")
    code = """
    mine = Host(bytes(64 << 20)); register(e, mine)
    e.disconnect(remote); e.connect(remote)
    before = faults.count('hixl.step')
    status = e.transfer_sync(remote, hixl.READ, descs((mine.addr, big, 64 << 20)), 60000)
    status, faults.count('hixl.step') - before, mine.data.count(5)
    """
    assert here(code, big=big) == (0, 32, 64 << 20)


def test_disconnect_waits_for_what_moves(here, there):
    """Some bytes are on their way while disconnect is called; when it returns, none are."""
    code = """
    faults.delay('hixl.step', 1.5)
    before = faults.count('hixl.step')
    piece = descs((m.addr, far, SIZE))
    thread = threading.Thread(
        target=lambda: in_thread(lambda: e.transfer_sync(remote, hixl.WRITE, piece, 60000), 0)
    )
    thread.start()
    eventually(lambda: faults.count('hixl.step') > before)
    e.disconnect(remote, 50), e.disconnect(remote, 60000)
    """
    assert here(code) == (103901, 0)
    data = there("m.data")
    here("thread.join()")
    assert there("m.data") == data


def test_a_hanging_transfer_is_ended_by_another_thread(here):
    code = """
    faults.fail('hixl.move', code=hixl.TIMEOUT)
    before = faults.count('hixl.move')
    piece = descs((m.addr, far, SIZE))
    results = []
    def transfer():
        runtime.aclrtSetDevice(0)
        results.append(e.transfer_sync(remote, hixl.READ, piece, 60000))
    thread = threading.Thread(target=transfer)
    thread.start()
    eventually(lambda: faults.count('hixl.move') > before)
    status = e.disconnect(remote)
    thread.join()
    status, results
    """
    assert here(code) == (0, [503900])


def test_a_transfer_that_timed_out_goes_on(here, there):
    here("faults.delay('hixl.move', 0.2)")
    assert here(WRITE.replace("SIZE)))", "SIZE)), 50)")) == 103901
    assert there("eventually(lambda: m.data == data)", data=pattern(100, SIZE))


def test_the_connection_breaks(here, there):
    here("faults.fail('hixl.link', code=1)")
    assert here(WRITE) == 503900
    assert here(f"{WRITE}, e.connect(remote)") == (503900, 103903)
    assert here("e.send_notify(remote, hixl.NotifyDesc('a', 'b'))") == 103904
    assert there("m.data") == pattern(1, SIZE)
    assert here(f"e.disconnect(remote), e.connect(remote), {WRITE}") == (0, 0, 0)


def test_the_connection_breaks_during_a_transfer(here, there):
    assert here(BEGIN) == 0
    here("faults.fail('hixl.link', code=1); status = " + READ)
    assert here("status, end_of(e, r)") == (503900, (0, "FAILED"))
    assert there("m.data") == pattern(1, SIZE)


LOOP = """
statuses, rounds = [], 0
def loop():
    global rounds
    runtime.aclrtSetDevice(0)
    while not statuses:
        m.fill(rounds % 250)
        status = {call}
        rounds += 1
        if status:
            statuses.append(status)
thread = threading.Thread(target=loop)
thread.start()
eventually(lambda: rounds > 2)
"""


def test_disconnect_during_writes(here, there):
    """When disconnect has returned nothing is written any more."""
    here(LOOP.format(call=WRITE))
    assert here("e.disconnect(remote)") == 0
    first = there("m.data")
    assert here("thread.join(); statuses[0]") in (503900, 103902)
    assert there("m.data") == first


def test_kill_during_reads():
    victim, survivor = Peer(), Peer()
    try:
        link(survivor, victim)
        survivor(LOOP.format(call=READ))
        victim.kill()
        assert survivor("thread.join(); statuses") == [503900]
        assert survivor("e.disconnect(remote)") == 0
    finally:
        victim.kill()
        survivor.close()


def test_finalize_during_transfers(here, there):
    here(LOOP.format(call=READ))
    there("e.finalize()")
    assert here("thread.join(); statuses") == [503900]
    here("e.disconnect(remote)")
    link(here, there)
    here(LOOP.format(call=READ))
    assert here("e.finalize(); thread.join(); statuses") in ([503900], [103902])


def test_a_device_is_taken_away(there):
    """What is in flight fails or not; nothing crashes, and the peer lives."""
    peer = Peer()
    try:
        name = free_name()
        addr = there("e = engine(name); m = Device(bytes(4096)); register(e, m); m.addr", name=name)
        code = "e = engine('127.0.0.1'); m = Device(bytes(4096)); register(e, m); e.connect(remote)"
        assert peer(code, remote=name, far=addr) == 0
        peer("faults.take_device_away(0)")
        assert peer("e.transfer_sync(remote, hixl.READ, descs((m.addr, far, 4096)))") == 503900
        assert there("1 + 1") == 2
    finally:
        peer.close()

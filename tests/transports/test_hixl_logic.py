# SPDX-License-Identifier: Apache-2.0
"""What the `hixl` transport makes of each answer that HIXL may give."""

from __future__ import annotations

import threading
import time

import pytest

from llm_datadist_torch import (
    LLMException,
    LLMParamError,
    LLMPeerLostError,
    LLMStatusCode,
    LLMTimeoutError,
)
from llm_datadist_torch.transports.base import (
    Direction,
    MemorySpan,
    PathUnavailable,
    RegionView,
)
from llm_datadist_torch.transports.hixl import messages, transfers
from llm_datadist_torch.transports.hixl.connection import Generations
from llm_datadist_torch.transports.hixl.ports import ModulePort
from llm_datadist_torch.transports.hixl.ranges import RegisteredRange
from llm_datadist_torch.transports.hixl.statuses import hixl_error
from llm_datadist_torch.values.deadline import Deadline
from tests.peers import eventually
from tests.transports.fake_hixl import TransferOp, TransferStatus
from tests.transports.hixl_rig import (
    ALREADY_CONNECTED,
    BASE,
    COMPLETED,
    FAILED,
    META,
    NOT_CONNECTED,
    PARAM_INVALID,
    REMOTE,
    RESOURCE_EXHAUSTED,
    SIZE,
    TIMEOUT,
    WAITING,
    moved,
)

# -- statuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (103900, "LLM_PARAM_INVALID"),
        (103901, "LLM_TIMEOUT"),
        (103902, "LLM_NOT_YET_LINK"),
        (103903, "LLM_ALREADY_LINK"),
        (103904, "LLM_FAILED"),
        (103905, "LLM_FEATURE_NOT_ENABLED"),
        (503900, "LLM_FAILED"),
        (203900, "LLM_FAILED"),
        (424242, "LLM_FAILED"),
    ],
)
def test_statuses(code, status):
    error = hixl_error(code, "stand on its head")
    assert error.status_code is LLMStatusCode[status]
    assert "HIXL could not stand on its head: " in str(error)
    assert f"({code})" in str(error)


# -- movements ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
def test_descriptors(rig, direction):
    assert rig.move(moved([(0, 128, 64), (256, 0, 8)], direction=direction)) == "hixl"
    ((_, op, descs),) = [call for call in rig.script.calls if call[0] == "transfer_async"]
    assert op is TransferOp[direction.name]
    there = 1 << 40
    assert descs == [
        (BASE, there + 128, 64),
        (BASE + 256, there, 8),
        (BASE + 4096, there + 4096 + 128, 64),
        (BASE + 4096 + 256, there + 4096, 8),
    ]
    assert rig.script.names() == ["connect", "transfer_async", "get_transfer_status"]


def test_it_connects_once(rig):
    for _ in range(3):
        rig.move()
    assert rig.count("connect") == 1


def test_a_connection_that_is_there_already_is_made_anew(rig):
    """HIXL has made it by itself, nobody knows when: it may not reach our memory."""
    rig.script.then("connect", ALREADY_CONNECTED)
    rig.move()
    assert rig.script.names()[:3] == ["connect", "disconnect", "connect"]


def test_many_runs_go_in_chunks(rig, monkeypatch):
    monkeypatch.setattr(ModulePort, "chunk", 3)
    monkeypatch.setattr(transfers, "MAX_REQUESTS", 2)
    runs = [(at * 16, at * 16, 16) for at in range(10)]
    rig.move(moved(runs, tensors=1))
    chunks = [call[2] for call in rig.script.calls if call[0] == "transfer_async"]
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 1]
    assert [desc for chunk in chunks for desc in chunk] == [
        (BASE + at, (1 << 40) + there, nbytes) for at, there, nbytes in runs
    ]
    # Never more than two under way: before the third request the first is asked about.
    assert rig.script.names()[1:4] == ["transfer_async", "transfer_async", "get_transfer_status"]


def test_it_polls_until_done_with_longer_and_longer_naps(rig, monkeypatch):
    naps = []
    monkeypatch.setattr(transfers.time, "sleep", naps.append)
    rig.script.then("get_transfer_status", *[WAITING] * 12, COMPLETED)
    rig.move()
    assert naps == sorted(naps)
    assert (naps[0], naps[-1]) == (transfers._SHORTEST_NAP_S, transfers._LONGEST_NAP_S)


def test_a_timeout_breaks_the_connection_first(rig):
    rig.script.then("get_transfer_status", *[WAITING] * 10_000)
    with pytest.raises(LLMTimeoutError, match="within 300 ms"):
        rig.move(ms=300)
    assert "disconnect" in rig.script.names()
    assert rig.reconnected()
    rig.script.answers.clear()
    assert rig.move() == "hixl"
    assert rig.count("connect") == 2


def test_it_returns_only_after_the_connection_is_broken(rig):
    """Not while HIXL is still disconnecting, which is when it may still be writing."""
    entered, leave = threading.Event(), threading.Event()

    def slowly(remote, timeout):
        entered.set()
        leave.wait(30)
        return 0

    rig.engine.disconnect = slowly
    rig.script.then("get_transfer_status", *[WAITING] * 10_000)
    failures = []

    def move():
        with pytest.raises(LLMTimeoutError) as caught:
            rig.move(ms=300)
        failures.append(caught.value)

    thread = threading.Thread(target=move, daemon=True)
    thread.start()
    assert entered.wait(30)
    time.sleep(0.05)
    assert thread.is_alive()
    leave.set()
    thread.join(30)
    assert len(failures) == 1


def test_a_connection_that_can_not_be_broken(rig):
    rig.script.then("get_transfer_status", *[WAITING] * 10_000)
    rig.script.then("disconnect", TIMEOUT, TIMEOUT, TIMEOUT)
    with pytest.raises(LLMException, match="may still be running") as caught:
        rig.move(ms=300)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert "finalize()" in str(caught.value)
    assert rig.count("disconnect") == 3
    rig.script.answers.clear()
    rig.script.then("disconnect", FAILED)
    with pytest.raises(LLMException, match="may still be running"):
        rig.move()
    assert rig.count("connect") == 1
    assert rig.move() == "hixl"
    assert rig.script.names()[-4:-2] == ["disconnect", "connect"]


@pytest.mark.parametrize(
    "answer", [(0, TransferStatus.FAILED), (FAILED, TransferStatus.WAITING), (FAILED, None)]
)
def test_a_failed_transfer(rig, answer):
    rig.script.then("get_transfer_status", answer)
    with pytest.raises(LLMException) as caught:
        rig.move()
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert rig.reconnected()
    assert rig.move() == "hixl"


def test_a_request_that_has_ended_is_not_asked_about_again(rig, monkeypatch):
    monkeypatch.setattr(ModulePort, "chunk", 1)
    rig.script.then("get_transfer_status", COMPLETED, WAITING, COMPLETED)
    rig.move()
    asked = [call[1] for call in rig.script.calls if call[0] == "get_transfer_status"]
    assert asked == [1, 2, 2]


def test_exhausted_resources_are_waited_for(rig):
    rig.script.then("transfer_async", *[(RESOURCE_EXHAUSTED, 0)] * 5)
    assert rig.move() == "hixl"
    assert rig.count("transfer_async") == 6


def test_exhausted_resources_until_the_deadline(rig):
    rig.script.then("transfer_async", *[(RESOURCE_EXHAUSTED, 0)] * 10_000)
    with pytest.raises(LLMTimeoutError):
        rig.move(ms=300)


def test_a_dropped_connection_is_made_anew(rig):
    rig.move()
    rig.script.then("transfer_async", (NOT_CONNECTED, 0))
    assert rig.move() == "hixl"
    assert rig.count("connect") == 2


def test_a_connection_that_is_dropped_again(rig):
    rig.script.then("transfer_async", *[(NOT_CONNECTED, 0)] * 2)
    with pytest.raises(LLMException) as caught:
        rig.move()
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.parametrize(
    ("code", "status"), [(TIMEOUT, "LLM_TIMEOUT"), (FAILED, "LLM_FAILED"), (1, "LLM_FAILED")]
)
def test_a_peer_that_can_not_be_connected(rig, code, status):
    rig.script.then("connect", code)
    with pytest.raises(LLMException, match=f"connect to {REMOTE}") as caught:
        rig.move()
    assert caught.value.status_code is LLMStatusCode[status]
    assert rig.count("transfer_async") == 0
    assert rig.move() == "hixl"


# -- memory that comes while HIXL is connected -----------------------------------------------------


LATE = 1 << 41


def later(address):
    """A movement of one tensor from there."""
    return moved(tensors=1, remote=address)


def served(rig, movement):
    try:
        return rig.move(movement) == "hixl"
    except PathUnavailable:
        return False


def test_later_memory_goes_by_another_path_until_the_connection_is_renewed(rig):
    rig.move()
    rig.advertise(RegisteredRange(LATE, SIZE, 2), whole=False)
    movement = later(LATE)
    with pytest.raises(PathUnavailable, match="does not reach this memory now"):
        rig.move(movement)
    assert rig.move() == "hixl", "what it reaches is served meanwhile"
    assert eventually(lambda: rig.count("connect") == 2)
    assert eventually(lambda: served(rig, movement))
    assert rig.count("disconnect") == 1


def test_later_memory_of_ours(rig):
    rig.move()
    rig.memory.add(MemorySpan(BASE * 4, SIZE, META))
    movement = moved(local=BASE * 4)
    with pytest.raises(PathUnavailable):
        rig.move(movement)
    assert eventually(lambda: served(rig, movement))


def test_later_memory_is_waited_for_where_nothing_else_serves(rig):
    rig.move()
    rig.advertise(RegisteredRange(LATE, SIZE, 2), whole=False)
    assert rig.channel.move_at_last(later(LATE), Deadline.after_ms(5000)) == "hixl"
    assert rig.script.names().count("disconnect") == 1


def test_a_burst_of_registrations_costs_one_connection(rig):
    rig.move()
    for number in range(50):
        rig.advertise(RegisteredRange(LATE + number * SIZE, SIZE, 2 + number), whole=False)
        with pytest.raises(PathUnavailable):
            rig.move(later(LATE + number * SIZE))
    assert eventually(lambda: served(rig, later(LATE + 49 * SIZE)))
    assert rig.count("connect") == 2


def test_the_peer_deregisters(rig):
    """We disconnect, say so, and come back when it tells what it has."""
    rig.move()
    rig.channel.note(messages.encode(messages.Disconnect()))
    assert eventually(lambda: messages.Disconnected() in rig.said)
    assert rig.count("disconnect") == 1
    with pytest.raises(PathUnavailable):
        rig.move()
    with pytest.raises(LLMTimeoutError):
        rig.channel.move_at_last(moved(), Deadline.after_ms(250))
    rig.channel.note(messages.encode(messages.Registered(1, rig.their_ranges, whole=True)))
    assert rig.move() == "hixl"
    assert rig.count("connect") == 2


def test_what_the_peer_has_not_registered_goes_by_another_path(rig):
    rig.move()
    with pytest.raises(PathUnavailable):
        rig.move(later(LATE))
    with pytest.raises(LLMParamError, match="peer's memory is not registered"):
        rig.channel.move_at_last(later(LATE), Deadline.after_ms(5000))
    assert rig.count("connect") == 1


def test_a_movement_whose_connection_another_one_breaks_is_tried_again(rig):
    """HIXL forgets its requests, as if they had never been."""
    rig.script.then("get_transfer_status", WAITING, (PARAM_INVALID, TransferStatus.FAILED))
    status = rig.engine.get_transfer_status

    def break_it_once(request):
        answer = status(request)
        if answer == WAITING:
            with rig.connection._changed:
                rig.connection._disconnect()
        return answer

    rig.engine.get_transfer_status = break_it_once
    assert rig.move() == "hixl"
    assert rig.count("transfer_async") == 2


# -- what may be moved ----------------------------------------------------------------------------


@pytest.mark.parametrize("local", [BASE - 1, BASE + SIZE - 4096 - 63, 0])
def test_local_memory_must_be_registered(rig, local):
    with pytest.raises(PathUnavailable):
        rig.move(moved(local=local))
    with pytest.raises(LLMParamError, match="local memory is not registered"):
        rig.channel.move_at_last(moved(local=local), Deadline.after_ms(5000))
    assert rig.script.calls == []


@pytest.mark.parametrize(("address", "nbytes"), [(1 << 40, 4096 + 63), ((1 << 40) + 1, SIZE)])
def test_the_peer_s_memory_must_be_in_its_region(rig, address, nbytes):
    with pytest.raises(LLMParamError, match="leaves the peer's memory"):
        rig.move(moved(region=RegionView(1, address, nbytes, -1, 0, 0)))
    assert rig.move(moved(region=RegionView(1, 1 << 40, 4096 + 64, -1, 0, 0))) == "hixl"


# -- ends -----------------------------------------------------------------------------------------


def test_a_link_that_ends_during_a_movement(rig):
    def end(request):
        rig.channel.close()
        return WAITING

    rig.engine.get_transfer_status = end
    with pytest.raises(LLMPeerLostError):
        rig.move()
    assert eventually(lambda: not [t for t in threading.enumerate() if REMOTE in t.name])
    assert [name for name in rig.script.names() if name.endswith("connect")] == [
        "connect",
        "disconnect",
    ]
    with pytest.raises(LLMPeerLostError):
        rig.move()


def test_a_new_link_does_not_suffer_from_the_old_ones_end(rig):
    rig.move()
    held = rig.connection._changed
    with held:  # so that the background can't disconnect before the new link connects
        rig.channel.close()
        rig.channel = rig.new_channel()
    assert rig.move() == "hixl"
    assert eventually(lambda: rig.script.names().count("disconnect") == 1)
    names = [name for name in rig.script.names() if name.endswith("connect")]
    assert names == ["connect", "disconnect", "connect"]


def test_what_is_abandoned_late_breaks_nothing_newer(rig):
    deadline = Deadline.after_ms(5000)
    with rig.connection.using(Generations(0, 0), deadline) as old:
        rig.connection.abandon(old)
    with rig.connection.using(Generations(0, 0), deadline):
        assert rig.connection.broken_since(old)
        rig.connection.abandon(old)
    assert rig.count("disconnect") == 1

# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the middle of a call: nothing is left behind, and the link stays usable."""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import inspect
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import llm_datadist_torch
from llm_datadist_torch import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    EventSynchronizer,
    LLMParamError,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.links import held_leases
from llm_datadist_torch.links.held_leases import HeldLeases
from llm_datadist_torch.links.link import Link, Pending
from llm_datadist_torch.movement.transfer import Transfer
from tests.peers import Peer, Ref, Service, eventually

KEY = BlocksCacheKey(2)
POOL = '{"memory_size": 131072, "page_shift": 12}'
STEP = 1 if os.environ.get("TEST_EVERY_PLACE") else 29
"""Every so-many-th place of public calls is tried, unless all are asked for."""
PACKAGE = str(Path(llm_datadist_torch.__file__).parent)


@pytest.fixture
def peer(here: Service, peers: Callable[[], Peer]) -> Peer:
    """Linked with ``here``; its cache "theirs" has KEY, and "mine" is to be pulled into."""
    here.start(1)
    made = peers()
    assert here.link(2, made.call("start", 2)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    made.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    made.call("paint", "theirs", 3)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 1)
    return made


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where the test run was started in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def nothing_is_left(here: Service, peer: Peer) -> bool:
    return eventually(
        lambda: peer.call("counters")["leases"] == peer.call("counters")["grants"] == 0
    ) and (here.counters()["leases"] == 0)


def test_while_the_owner_is_silent(here: Service, peer: Peer) -> None:
    link = here.instance.links.registry.get(2)

    def interrupt() -> None:
        # A signal that nobody waits for would end the test run.
        if eventually(lambda: bool(link._pending)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with peer.stopped():
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0], timeout=60_000)
        thread.join()
    assert nothing_is_left(here, peer)
    assert here.held["mine"].cache.tensors[0].cpu().unique().tolist() == [1]
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert here.held["mine"].cache.tensors[0][0].cpu().unique().tolist() == [3]


def test_in_the_moment_in_which_the_answer_comes(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer brings a lease that nobody would return."""
    wait = Pending.wait

    def interrupted(self: Pending, deadline: object) -> None:
        assert wait(self, deadline) is not None  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert nothing_is_left(here, peer)
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])


@functools.cache
def handlers(code: CodeType) -> list[tuple[int, int, int]]:
    parse = getattr(dis, "_parse_exception_table", lambda _: [])
    return [(entry.start, entry.end, entry.target) for entry in parse(code)]


def handler_of(code: CodeType, offset: int) -> int:
    """Where an exception in this instruction goes on in its function; -1 for nowhere."""
    found = (target for start, end, target in handlers(code) if start <= offset < end)
    return next(found, -1)


class Bomb:
    """Ctrl-C at the n-th place (of all of ours, or of some) where the interpreter handles signals.

    That is in calls, at the beginning of a function, and where it jumps back: between leaving a
    ``with`` and giving back its lock, for example, it does not look. Here it is raised one step
    later than there, so not where another handler, or none, would see it than that of the call.
    """

    def __init__(self, at: int, functions: list[Callable[..., Any]] | None = None) -> None:
        self.codes = functions and {inspect.unwrap(function).__code__ for function in functions}
        self.left = at
        self.gone_off = ""
        self.before: dict[FrameType, int] = {}

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code not in self.codes if self.codes else not code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not self.gone_off:
            before = self.before.get(frame, -1)
            self.before[frame] = frame.f_lasti
            name = dis.opname[frame.f_code.co_code[before]] if before >= 0 else "CALL"
            if not name.startswith(("CALL", "RESUME", "JUMP_BACKWARD")):
                return self.trace
            if before >= 0 and handler_of(code, before) != handler_of(code, frame.f_lasti):
                return self.trace
            if self.left == 0:
                self.gone_off = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self.left -= 1
        return self.trace


def test_between_any_two_steps(here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes, the lease goes back, and the next pull works."""
    monkeypatch.setattr(held_leases, "SWEEP_S", 0.02)
    link = here.instance.links.registry.get(2)
    functions = [
        Transfer._move_leased,
        Link.request,
        Link.on_reply,
        Link.give_back,
        HeldLeases.note,
        HeldLeases.give_back,
    ]
    places: set[str] = set()
    for at in range(2000):
        bomb = Bomb(at, functions)
        before, interrupted = sys.gettrace(), False
        sys.settrace(bomb.trace)
        try:
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        assert interrupted == bool(bomb.gone_off)
        if not interrupted:
            break
        places.add(bomb.gone_off)
        assert eventually(lambda: not link.held._tickets), bomb.gone_off
        assert nothing_is_left(here, peer), bomb.gone_off
    else:
        pytest.fail("there is no end to it")
    assert at > 20
    # An answer that comes late is noted by the I/O thread, where nothing interrupts.
    assert len({place.partition(":")[0] for place in places}) >= len(functions) - 2
    assert nothing_is_left(here, peer)
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert here.held["mine"].cache.tensors[0][0].cpu().unique().tolist() == [3]


def test_a_second_time_while_the_lease_goes_back(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if somebody keeps the traceback, and with it all that the call had."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Link, "give_back", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert nothing_is_left(here, peer)
    assert kept.tb is not None


@pytest.mark.same_on_every_device
def test_with_a_secret_the_lease_goes_back_too(
    here: Service, peers: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS the I/O thread reads the answer."""
    monkeypatch.setattr(held_leases, "SWEEP_S", 0.02)
    options = {"llm.LinkSecret": "a secret of more than 16 characters"}
    # In another PID namespace than the peer's it would stay with TCP.
    monkeypatch.setattr("llm_datadist_torch.net.unix.connect", stay_with_tcp)
    here.start(1, options=options)
    peer = peers()
    assert here.link(2, peer.call("start", 2, options=options))[0] == "LLM_SUCCESS"
    peer.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    here.allocate("mine", 2, 8, 4096, paged=True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert here.instance.links.registry.get(2).connection.answers is None
    with monkeypatch.context() as patch:
        patch.setattr(Link, "give_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert nothing_is_left(here, peer)


def stay_with_tcp(
    _loop: object, _connection: object, _said: object, done: Callable[[], None]
) -> None:
    done()


def exploded(bomb: Bomb, call: Callable[[], object]) -> bool:
    """Whether the bomb has gone off in the call."""
    before = sys.gettrace()
    sys.settrace(bomb.trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        # Frames keep all that they had.
        bomb.before.clear()
    assert not bomb.gone_off
    return False


def everywhere(call: Callable[[], object], check: Callable[[str], None]) -> int:
    """Interrupt a call at each place of our frames; how many there are."""
    for at in range(5000):
        bomb = Bomb(at)
        if not exploded(bomb, call):
            return at
        check(bomb.gone_off)
    pytest.fail("there is no end to it")


COPIES: dict[str, Callable[[Service], object]] = {
    "copy_blocks": lambda here: here.run("copy_blocks", Ref("mine"), {0: [1]}),
    "copy_cache": lambda here: here.run("copy_cache", Ref("rows"), Ref("rows"), 1, 0),
    "copies that do not block": lambda here: here.run(
        "copy_blocks", Ref("mine"), {0: [1]}, non_blocking=True
    ),
}


@pytest.mark.parametrize("what", COPIES)
def test_copies_at_every_place(here: Service, what: str) -> None:
    here.start(1)
    for name, paged in (("mine", True), ("rows", False)):
        here.allocate(name, 2, 8, 4096, paged=paged)
        here.paint(name, 1)

    def check(place: str) -> None:
        assert here.counters()["leases"] == 0, place

    assert everywhere(lambda: COPIES[what](here), check) > 20
    COPIES[what](here)


PULLS: dict[str, tuple[str, Any]] = {
    "pull_blocks": ("pull_blocks", (KEY, Ref("mine"), [0], [0])),
    "pull_cache": ("pull_cache", (CacheKeyByIdAndIndex(2, 2), Ref("row"))),
    "push_blocks": ("push_blocks", (KEY, Ref("mine"), [0], [0])),
}


@pytest.mark.parametrize("remote", [True, False], ids=["known", "two-sided"])
@pytest.mark.parametrize("what", PULLS)
def test_transfers_at_every_place(
    here: Service,
    peers: Callable[[], Peer],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    remote: bool,
) -> None:
    """No lease, here or at the peer, is lost, and no right to transfer; then the link can end."""
    monkeypatch.setattr(held_leases, "SWEEP_S", 0.02)
    here.start(1, remote=remote)
    peer = peers()
    assert here.link(2, peer.call("start", 2, remote=remote)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    peer.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    peer.call("allocate", "their row", 2, 1, 4096, paged=False)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.allocate("row", 2, 1, 4096, paged=False)
    link = here.instance.links.registry.get(2)
    operation, arguments = PULLS[what]
    here.run(operation, *arguments)

    def check(place: str) -> None:
        assert here.counters()["leases"] == 0, place
        assert link.transfers.idle, place
        assert eventually(lambda: not link.held._tickets), place

    assert everywhere(lambda: here.run(operation, *arguments), check) > 50
    assert nothing_is_left(here, peer)
    here.run(operation, *arguments)
    assert here.unlink(2, force=True) == ("LLM_SUCCESS", ["LLM_SUCCESS"])


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Sockets:
    """What an instance has of the system: it must all be given back."""

    def __init__(self) -> None:
        self.threads = threading.active_count()
        self.descriptors = num_descriptors()

    def are_back(self) -> bool:
        gc.collect()  # what an interrupted call had may hang on its exception
        return eventually(
            lambda: (
                threading.active_count() <= self.threads and num_descriptors() <= self.descriptors
            )
        )


def test_finalize_at_every_place(here: Service, peers: Callable[[], Peer]) -> None:
    """Called again it finishes the work: threads, sockets, memory and the port are given back."""
    peer = peers()
    theirs = peer.call("start", 2)
    port, at, places = 0, 0, set[str]()
    # The first use of some parts keeps a descriptor for good.
    for warm in (True, False):
        before = Sockets()
        while True:
            port = here.start(1, listen=f"127.0.0.1:{port}", pool=POOL)
            assert here.link(2, theirs) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
            here.allocate("mine", 2, 8, 4096, paged=True)
            memory = weakref.ref(here.instance.memory(Placement.DEVICE))
            here.dd.on_link_event(lambda _: None)
            here.dd.on_request(lambda *_: b"")
            datadist, bomb = here.dd, Bomb(at)
            interrupted = not warm and exploded(bomb, datadist.finalize)
            datadist.finalize()
            here.held.clear()
            assert not datadist.initialised, bomb.gone_off
            assert before.are_back(), bomb.gone_off
            assert memory() is None, bomb.gone_off
            assert eventually(lambda: peer.call("link_states") in ({}, {1: "lost"})), bomb.gone_off
            if not interrupted:
                break
            places.add(bomb.gone_off)
            at += min(STEP, 7)
    assert at > 150, places


def _link(here: Service, port: int) -> None:
    """Also where the call before it was interrupted after the link had been made."""
    assert here.link(2, port)[1][0] in ("LLM_SUCCESS", "LLM_ALREADY_LINK")


def _transfer_layers(here: Service, _: int) -> None:
    layers = range(1)
    ready = EventSynchronizer([threading.Event() for _ in layers])
    for layer in layers:
        ready.record(layer)
    config = TransferWithCacheKeyConfig(KEY, layers, layers)
    mine = here.held["mine"].cache
    task = here.manager.transfer_cache_async(mine, ready, [config], [0], [0])
    task.synchronize(10_000)


def _register(here: Service, _: int) -> None:
    here.register("more", 2, 8, 4096, paged=True)
    here.drop("more")


def _allocate(here: Service, _: int) -> None:
    here.allocate("more", 2, 8, 4096, paged=True)
    here.drop("more")


PUBLIC_CALLS: dict[str, Callable[[Service, int], object]] = {
    "allocate and deallocate": _allocate,
    "register and unregister": _register,
    "remove_cache_key": lambda here, _: here.manager.remove_cache_key(CacheKey(1, 8)),
    "swap_blocks": lambda here, _: here.run("swap_blocks", Ref("mine"), Ref("host"), {0: 1}),
    "transfer_cache_async": _transfer_layers,
    "pull_blocks_async": lambda here, _: here.manager.pull_blocks_async(
        KEY, here.held["mine"].cache, [0], [0]
    ).synchronize(10_000),
    "link_clusters": _link,
    "unlink_clusters": lambda here, _: here.unlink(2),
    "links": lambda here, _: here.dd.links(),
    "stats": lambda here, _: here.dd.stats(),
    "request": lambda here, _: here.dd.request(2, b"?", timeout=5000),
    "identify": lambda here, port: here.dd.identify("127.0.0.1", port, timeout=5000),
    "on_link_event": lambda here, _: here.dd.on_link_event(print).remove(),
}


def _warm_up(here: Service, peer: Peer) -> None:
    """Use the parts whose first use keeps a descriptor for good."""
    here.start(1)
    _link(here, peer.call("start", 2))
    here.dd.finalize()
    peer.close()


@pytest.mark.thorough
@pytest.mark.parametrize("what", PUBLIC_CALLS)
def test_public_calls_at_every_place(
    here: Service, peers: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What was interrupted can be called again; no lease, lock or turn to relink is lost."""
    monkeypatch.setattr(held_leases, "SWEEP_S", 0.02)
    _warm_up(here, peers())
    before = Sockets()
    here.start(1)
    peer = peers()
    port = peer.call("start", 2)
    peer.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    peer.call("on_request_echo")
    for name, where in (("mine", Placement.DEVICE), ("host", Placement.HOST)):
        here.allocate(name, 2, 8, 4096, paged=True, placement=where)
    call = PUBLIC_CALLS[what]
    # What an interrupted call has made and not returned has no name any more.
    own = {cache.cache_id for cache in (here.held[name].cache for name in ("mine", "host"))}
    for at in range(0, 5000, STEP):
        _link(here, port)
        bomb = Bomb(at)
        if not exploded(bomb, lambda: call(here, port)):
            break
        _link(here, port)
        assert eventually(lambda: here.counters()["leases"] == 0), bomb.gone_off
        link = here.instance.links.registry.get(2)
        assert eventually(lambda: link.transfers.idle), bomb.gone_off  # noqa: B023
        assert eventually(lambda: not link.held._tickets), bomb.gone_off  # noqa: B023
        for cache_id in set(here.instance.catalog.ids()) - own:
            with contextlib.suppress(LLMParamError):  # an allocated one stays until the end
                here.manager.unregister_cache(cache_id)
        call(here, port)
    else:
        pytest.fail("there is no end to it")
    _link(here, port)
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    here.held.clear()
    here.dd.finalize()
    peer.close()
    assert before.are_back()


def test_a_storm_of_signals(here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT in random moments, wherever the interpreter and the extension look for signals."""
    monkeypatch.setattr(held_leases, "SWEEP_S", 0.02)
    here.register("user's", 2, 8, 4096, paged=True)
    main, chance, done = threading.main_thread().ident, random.Random(3), threading.Event()
    armed = False

    def strike() -> None:
        while not done.wait(chance.uniform(0.0002, 0.004)):
            signal.pthread_kill(main or 0, signal.SIGINT)

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    calls = [
        lambda: here.run("pull_blocks", KEY, Ref("user's"), [0], [0]),
        lambda: here.run("push_blocks", KEY, Ref("mine"), [1], [1]),
        lambda: here.run("copy_blocks", Ref("mine"), {0: [1]}),
    ]
    struck, thread = 0, threading.Thread(target=strike)
    end = time.monotonic() + 3
    thread.start()
    while time.monotonic() < end:
        try:
            armed = True
            while time.monotonic() < end:
                chance.choice(calls)()
            armed = False
        except KeyboardInterrupt:
            armed = False
            struck += 1
    done.set()
    thread.join()
    assert struck > 50
    assert nothing_is_left(here, peer)
    here.manager.unregister_cache(here.cache_id("user's"), timeout=10_000)
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert here.unlink(2, force=True) == ("LLM_SUCCESS", ["LLM_SUCCESS"])

# SPDX-License-Identifier: Apache-2.0
"""When ``transfer_cache_async`` sends what, and what becomes of each config (10.2, 10.4)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import (
    CacheKeyByIdAndIndex,
    EventSynchronizer,
    LayerSynchronizer,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.values.status import error_for
from tests.asynchronous.helpers import (
    FAILED,
    KNE,
    NYL,
    PEER,
    PI,
    SUCCESS,
    TIMEOUT,
    UNKNOWN,
    WAIT_MS,
    Answers,
    Far,
    Gate,
    Ready,
    Source,
)
from tests.peers import Peer, Service, eventually

THIRD = 3


def config(
    cache_id: int, src: range, dst: range | None = None, row: int = 0, peer: int = PEER
) -> TransferWithCacheKeyConfig:
    key = CacheKeyByIdAndIndex(peer, cache_id, row)
    return TransferWithCacheKeyConfig(key, src, src if dst is None else dst)


def start(here: Service, source: Source, synchronizer: LayerSynchronizer, *configs: Any) -> Any:
    return here.manager.transfer_cache_async(source.cache, synchronizer, list(configs))


@pytest.fixture
def source(here: Service) -> Source:
    return Source(here, "src", 8, 2, 16, paged=False)


@pytest.fixture
def dst(far: Far) -> int:
    return far.make("allocated", "dst", 8, 3, 16, paged=False)


def rows(source: Source, layers: range, row: int = 0) -> list[tuple[int, int, bytes]]:
    """What layers of the source's first row are at the peer's ``row``."""
    tensors = range(layers.start * 2, layers.stop * 2)
    return [(t, row * 16, source.part(t, 0, 16)) for t in tensors]


# -- asking ---------------------------------------------------------------------------------------


def test_each_wanted_layer_is_asked_for_once(here: Service, source: Source, dst: int) -> None:
    ready = Ready()
    task = start(here, source, ready, config(dst, range(3, 4)), config(dst, range(2), row=1))
    assert task.synchronize(WAIT_MS) == SUCCESS
    assert ready.asked == [(0, None), (1, None), (3, None)]
    assert (task.layers_done, task.layers_total) == (3, 3)


def test_asked_in_a_daemon_thread(here: Service, source: Source, dst: int) -> None:
    threads: list[threading.Thread] = []

    class Where(LayerSynchronizer):
        def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
            threads.append(threading.current_thread())
            return True

    assert start(here, source, Where(), config(dst, range(1))).synchronize(WAIT_MS) == SUCCESS
    assert threads[0] is not threading.current_thread()
    assert threads[0].daemon


def test_a_layer_goes_when_it_is_ready(here: Service, far: Far, source: Source, dst: int) -> None:
    gate = Gate(4)
    task = start(here, source, gate, config(dst, range(3)), config(dst, range(1, 3), row=2))
    far.expect("dst")
    assert task.synchronize(0) == TIMEOUT
    gate.gates[0].set()
    assert gate.entered[1].wait(60)
    far.expect("dst", *rows(source, range(1)))
    assert (task.layers_done, task.layers_total) == (1, 3)
    gate.gates[1].set()
    assert gate.entered[2].wait(60)
    far.expect("dst", *rows(source, range(2)), *rows(source, range(1, 2), row=2))
    assert task.get_results(0) == [TIMEOUT, TIMEOUT]
    gate.open()
    assert task.get_results(WAIT_MS) == [SUCCESS, SUCCESS]
    far.expect("dst", *rows(source, range(3)), *rows(source, range(1, 3), row=2))


def test_events(here: Service, far: Far, source: Source, dst: int) -> None:
    ready = EventSynchronizer([threading.Event() for _ in range(4)])
    task = start(here, source, ready, config(dst, range(4)))
    for layer in range(4):
        assert task.synchronize(0) == TIMEOUT
        ready.record(layer)
    assert task.synchronize(WAIT_MS) == SUCCESS
    far.expect("dst", *rows(source, range(4)))


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("falsy", [False, None, 0])
def test_false_fails_those_who_want_the_layer(
    here: Service, far: Far, source: Source, dst: int, falsy: Any
) -> None:
    """With LLM_PARAM_INVALID (section 14, 4); the others go on (section 14, 3)."""
    ready = Answers(True, falsy, True, True)
    configs = [config(dst, range(3)), config(dst, range(1), row=1), config(dst, range(2, 4), row=2)]
    task = start(here, source, ready, *configs)
    assert task.get_results(WAIT_MS) == [PI, SUCCESS, SUCCESS]
    assert task.synchronize() == PI
    assert "layer 1" in str(task.exception())
    sent = [rows(source, range(1)), rows(source, range(1), 1), rows(source, range(2, 4), 2)]
    far.expect("dst", *[patch for patches in sent for patch in patches])
    # Layer 2 is still wanted, by the last config.
    assert [layer for layer, _ in ready.asked] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("broken"), UNKNOWN), (error_for(TIMEOUT, "late"), TIMEOUT)],
    ids=["any", "typed"],
)
def test_raising_ends_the_task(
    here: Service,
    far: Far,
    source: Source,
    dst: int,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: Any,
) -> None:
    """The reference says success (section 14, 2)."""
    ready = Answers(True, error, True, True)
    configs = [config(dst, range(1)), config(dst, range(1, 2)), config(dst, range(2, 3), row=1)]
    task = start(here, source, ready, *configs)
    assert task.synchronize(WAIT_MS) == status
    assert task.get_results() == [SUCCESS, status, None]
    assert [layer for layer, _ in ready.asked] == [0, 1]
    assert task.exception() is error or task.exception().__cause__ is error
    assert "layer 1" in caplog.text
    far.expect("dst", *rows(source, range(1)))


def test_nobody_is_asked_for_nobody(here: Service, source: Source, dst: int) -> None:
    """Layers that only failed configs want are skipped."""
    ready = Answers(False, True, True, True)
    assert start(here, source, ready, config(dst, range(4))).get_results(WAIT_MS) == [PI]
    assert ready.asked == [(0, None)]


# -- one result for each config -------------------------------------------------------------------


def test_several_peers_one_result_each(
    here: Service, far: Far, source: Source, dst: int, peers: Callable[[], Peer]
) -> None:
    """Section 14, 3: neither stops the others, also where two go to one peer."""
    other = Far(peers())
    assert here.link(THIRD, other.call("start", THIRD))[0] == "LLM_SUCCESS"
    third = other.make("allocated", "dst", 4, 1, 16, paged=False)
    task = start(
        here,
        source,
        Ready(),
        config(dst, range(2)),
        config(1, range(2), peer=9),  # not linked
        config(dst + 50, range(2)),  # not there
        config(third, range(1, 2), range(2, 3), peer=THIRD),  # no such layer
        config(third, range(2), peer=THIRD),
        config(dst, range(2), row=2),
    )
    assert task.get_results(WAIT_MS) == [SUCCESS, NYL, KNE, PI, SUCCESS, SUCCESS]
    assert task.synchronize() == NYL
    far.expect("dst", *rows(source, range(2)), *rows(source, range(2), row=2))
    other.expect("dst", *rows(source, range(2)))


def test_a_peer_that_dies(here: Service, source: Source, peers: Callable[[], Peer]) -> None:
    other = Far(peers())
    assert here.link(THIRD, other.call("start", THIRD))[0] == "LLM_SUCCESS"
    third = other.make("allocated", "dst", 8, 1, 16, paged=False)
    gate = Gate(4)
    task = start(here, source, gate, config(third, range(4), peer=THIRD))
    gate.gates[0].set()
    assert gate.entered[1].wait(60)
    other.process.kill()
    gate.open()
    assert task.get_results(WAIT_MS) == [NYL]


def test_a_peer_that_sleeps(peers: Callable[[], Peer]) -> None:
    here, other = Service(), Far(peers())
    try:
        here.start(1, timeout_ms=200)
        assert here.link(PEER, other.call("start", PEER))[0] == "LLM_SUCCESS"
        source = Source(here, "src", 2, 1, 16, paged=False)
        dst = other.make("allocated", "dst", 2, 1, 16, paged=False)
        with other.process.stopped():
            assert start(here, source, Ready(), config(dst, range(1))).get_results(WAIT_MS) == [
                TIMEOUT
            ]

        def sent() -> bool:
            task = start(here, source, Ready(), config(dst, range(1)))
            return task.get_results(WAIT_MS) == [SUCCESS]

        # An engine first makes the connection anew that the timeout has broken.
        assert eventually(sent)
        assert eventually(lambda: other.call("counters")["leases"] == 0)
    finally:
        here.finish()


# -- the source -----------------------------------------------------------------------------------


def test_a_source_that_has_ended(here: Service, far: Far, source: Source, dst: int) -> None:
    here.drop("src")
    ready = Ready()
    task = start(here, source, ready, config(dst, range(4)), config(dst, range(1)))
    assert task.done()
    assert task.get_results() == [KNE, KNE]
    assert not ready.asked


def test_a_source_deallocated_meanwhile(here: Service, far: Far, dst: int) -> None:
    """Its memory stays until the task is done (section 14, 25)."""
    source = Source(here, "mine", 8, 1, 16, paged=False, kind="allocated")
    gate = Gate(4)
    task = start(here, source, gate, config(dst, range(4)))
    here.drop("mine")
    assert here.counters()["caches"] == 1
    gate.open()
    assert task.synchronize(WAIT_MS) == SUCCESS
    assert here.counters()["caches"] == 0
    far.expect("dst", *rows(source, range(4)))


def test_unregister_waits_for_the_task(peers: Callable[[], Peer]) -> None:
    here = Service()
    try:
        here.start(1, timeout_ms=100)
        source = Source(here, "src", 2, 1, 16, paged=False)
        gate = Gate(1)
        task = start(here, source, gate, config(1, range(1)))
        failure = here.attempt("unregister_cache", source.cache.cache_id)
        assert failure is not None
        assert failure.status == "LLM_TIMEOUT"
        assert task.cancel()
        here.run("unregister_cache", source.cache.cache_id)
        gate.open()
        assert task.get_results() == [None]
    finally:
        here.finish()


# -- ending it -------------------------------------------------------------------------------------


def test_cancel_between_layers(here: Service, far: Far, source: Source, dst: int) -> None:
    gate = Gate(4)
    configs = [config(dst, range(1)), config(dst, range(3)), config(dst, range(2, 4), row=1)]
    task = start(here, source, gate, *configs)
    gate.gates[0].set()
    assert gate.entered[1].wait(60)
    assert task.cancel()
    assert task.done()
    gate.open()
    assert task.get_results() == [SUCCESS, FAILED, None]
    assert task.synchronize() == FAILED
    assert task.cancelled()
    assert here.counters()["leases"] == 0
    far.expect("dst", *rows(source, range(1)))
    assert not gate.entered[2].is_set()


def test_finalize_with_a_hanging_synchronizer(here: Service, source: Source, dst: int) -> None:
    """Section 14, 33."""
    gate = Gate(4)
    tasks = [start(here, source, gate, config(dst, range(4))) for _ in range(3)]
    gate.gates[0].set()
    assert gate.entered[1].wait(60)
    assert eventually(lambda: all(task.layers_done for task in tasks))
    here.dd.finalize()
    assert [task.get_results(0) for task in tasks] == [[FAILED]] * 3
    gate.open()


def test_finalize_from_a_synchronizer(here: Service, source: Source, dst: int) -> None:
    class Finalizes(LayerSynchronizer):
        def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
            here.dd.finalize()
            return True

    assert start(here, source, Finalizes(), config(dst, range(1))).get_results(WAIT_MS) == [None]


def test_waiting_tasks_do_not_hold_up_pulls(here: Service, far: Far, source: Source) -> None:
    gate = Gate(4)
    dst = far.make("allocated", "dst", 8, 3, 16, paged=False)
    tasks = [start(here, source, gate, config(dst, range(1))) for _ in range(40)]
    running = here.instance.layer_workers
    assert running.num_threads == 32
    key = CacheKeyByIdAndIndex(PEER, dst, 1)
    pulled = here.manager.pull_cache_async(key, source.cache, 1)
    assert pulled.synchronize(WAIT_MS) == SUCCESS
    gate.open()
    assert {task.synchronize(WAIT_MS) for task in tasks} == {SUCCESS}

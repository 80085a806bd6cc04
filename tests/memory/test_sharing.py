# SPDX-License-Identifier: Apache-2.0
"""Caches' tensors through torch.multiprocessing: the receiver maps the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_datadist_torch import BlocksCacheKey
from tests.peers import Ref, Service

SIZE = (3, 4, 5000)
POOLS = [None, '{"memory_size": 1048576, "page_shift": 12}']


def add_one(inbox: Any, outbox: Any) -> None:
    """Another process: adds 1 to whatever it gets, and sends it back."""
    while True:
        tensors = inbox.get()
        if tensors is None:
            return
        for tensor in tensors:
            tensor += 1
        outbox.put([int(tensor.sum()) for tensor in tensors])


@pytest.fixture(params=["spawn", "fork"])
def other(request: pytest.FixtureRequest) -> Any:
    """Sends tensors to a process, and returns the sums it sends back."""
    context = torch.multiprocessing.get_context(request.param)
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=add_one, args=(inbox, outbox))
    process.start()

    def send(*tensors: torch.Tensor) -> list[int]:
        inbox.put(list(tensors))
        return outbox.get(timeout=60)  # type: ignore[no-any-return]

    yield send
    inbox.put(None)
    process.join(30)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("pool", POOLS)
def test_the_receiver_writes_into_the_cache(other: Any, pool: str | None) -> None:
    service = Service()
    service.start(1, pool=pool, device="cpu")
    try:
        service.allocate("cache", *SIZE, paged=True, keys=BlocksCacheKey(1))
        service.paint("cache", 1)
        cache = service.held["cache"].cache
        before = cache.tensor_addrs
        first, second, third = cache.tensors
        assert other(first, second[1:3], third[2, 7:9]) == [40_000, 20_000, 4]
        assert cache.tensor_addrs == before
        assert first.unique().tolist() == [2]
        assert second[1:3].unique().tolist() == [2]
        assert second[0].unique().tolist() == [1]
        assert third.sum() == third.numel() + 2
        assert service.attempt("copy_blocks", Ref("cache"), {0: [3]}) is None
    finally:
        service.finish()


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_other_tensors_are_sent_as_ever(other: Any) -> None:
    service = Service()
    service.start(1, device="cpu")
    try:
        service.allocate("cache", *SIZE, paged=True)
        service.register("given", *SIZE, paged=True)
        mine, given = torch.ones(10), service.held["given"].given[0]
        assert other(mine, torch.empty(0), given) == [20, 0, 20_000]
        assert mine.tolist() == [2] * 10
        # torch has moved the caller's memory, and the cache says so.
        failure = service.attempt("copy_blocks", Ref("given"), {0: [1]})
        assert failure is not None
        assert "torch.multiprocessing" in failure.text
    finally:
        service.finish()

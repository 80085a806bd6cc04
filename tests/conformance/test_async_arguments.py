# SPDX-License-Identifier: Apache-2.0
"""What ``transfer_cache_async`` refuses at once, and in which order (reference API, 10.1)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMParamError,
    LLMStatusCode,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests.asynchronous.helpers import NYL, PI, WAIT_MS, Ready
from tests.peers import Service

pytestmark = pytest.mark.same_on_every_device

BAD = object()
NOT_LINKED = 7


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    made.start(1)
    made.register("rows", 4, 2, 16, paged=False)
    made.register("blocks", 4, 4, 16, paged=True)
    made.register("odd", 3, 2, 16, paged=False)
    made.register("host", 4, 2, 16, paged=False, placement=Placement.HOST)
    yield made
    made.finish()


def at(*args: Any) -> TransferConfig:
    return TransferConfig(NOT_LINKED, *args)


def by_key(
    src: range | None, dst: range, row: int = 0, **changes: Any
) -> TransferWithCacheKeyConfig:
    """With ``changes``, which its setters let pass."""
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(NOT_LINKED, 1), src, dst, row)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def call(service: Service, cache: Any, *args: Any) -> Any:
    source = service.held[cache].cache if isinstance(cache, str) else cache
    return service.manager.transfer_cache_async(source, *args)


TWO, FOUR = at([1, 2], range(1)), at([1, 2, 3, 4])
BLOCKS_KEY = BlocksCacheKey(NOT_LINKED, 0)

# Each row breaks one rule and all that come later, as far as they can be broken together.
ORDER: list[tuple[str, tuple[Any, ...], type[Exception]]] = [
    ("no cache", (None, BAD, BAD, BAD, BAD, -1), TypeError),
    ("other cache", (1, BAD, BAD, BAD, BAD, -1), TypeError),
    ("host", ("host", BAD, BAD, BAD, BAD, -1), LLMParamError),
    ("dst type", ("odd", BAD, BAD, [-1], 1, -1), TypeError),
    ("dst element", ("odd", BAD, BAD, [-1], ["0"], -1), TypeError),
    ("dst width", ("odd", BAD, BAD, BAD, [-1], -1), ValueError),
    ("dst tensor", ("odd", BAD, BAD, BAD, torch.tensor([-1]), -1), ValueError),
    ("dst tensor type", ("odd", BAD, BAD, [-1], torch.tensor([0.5]), -1), TypeError),
    ("src type", ("odd", BAD, BAD, 1, [0], -1), TypeError),
    ("src width", ("odd", BAD, BAD, [2**64], [0], -1), ValueError),
    ("size width", ("odd", BAD, BAD, [1], None, -1), ValueError),
    ("size type", ("odd", BAD, BAD, [1], None, "8"), TypeError),
    ("src alone", ("odd", BAD, BAD, [1], None, 8), LLMParamError),
    ("src alone, empty dst", ("odd", BAD, BAD, [1], (), 8), LLMParamError),
    ("lengths", ("odd", BAD, BAD, [1], [1, 2], 8), LLMParamError),
    ("no size", ("odd", BAD, BAD, None, [1]), LLMParamError),
    ("no size, empty src", ("odd", BAD, BAD, [], [1]), LLMParamError),
    ("synchronizer", ("odd", BAD, BAD, None, None, 8), TypeError),
    ("no synchronizer", ("odd", None, BAD, None, None, 8), TypeError),
    ("configs", ("odd", Ready(), BAD, None, None, 8), TypeError),
    ("no configs", ("odd", Ready(), None, None, None, 8), TypeError),
    ("config", ("odd", Ready(), [TWO, BAD], None, None, 8), TypeError),
    ("no config", ("odd", Ready(), [None], None, None, 8), TypeError),
    ("size without dst", ("odd", Ready(), [FOUR], None, None, 8), LLMParamError),
    ("odd number of tensors", ("odd", Ready(), [FOUR]), LLMParamError),
    ("row with blocks", ("blocks", Ready(), [at([1], range(9), 1)], [0], [0]), LLMParamError),
    ("range", ("rows", Ready(), [at([1, 2], range(2, 3))]), LLMParamError),
    ("huge range", ("rows", Ready(), [at([1, 2], range(2**62))]), LLMParamError),
    ("too few addresses", ("rows", Ready(), [FOUR, at([1, 2])]), LLMParamError),
    ("too many addresses", ("rows", Ready(), [at([1, 2, 3, 4], range(1))]), LLMParamError),
    # What the setters of the configs let pass.
    ("key", ("rows", Ready(), [by_key(range(1), range(1), cache_key=None)]), TypeError),
    ("dst", ("rows", Ready(), [by_key(range(1), range(1), dst_layer_range=None)]), TypeError),
    (
        "layers",
        ("rows", Ready(), [by_key(range(1), range(1), dst_layer_range=range(2))]),
        LLMParamError,
    ),
    (
        "all layers",
        ("rows", Ready(), [by_key(range(1), range(1), src_layer_range=None)]),
        LLMParamError,
    ),
    (
        "row with a blocks key",
        ("rows", Ready(), [by_key(range(1), range(1), cache_key=BLOCKS_KEY, src_batch_index=1)]),
        LLMParamError,
    ),
    ("blocks cut", ("blocks", Ready(), [FOUR], None, [0], 8), LLMParamError),
]


@pytest.mark.parametrize(("args", "error"), [row[1:] for row in ORDER], ids=[r[0] for r in ORDER])
def test_order(service: Service, args: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        call(service, *args)
    assert isinstance(raised.value, LLMException) is (error is LLMParamError)


@pytest.mark.parametrize("configs", [[], ()], ids=str)
@pytest.mark.parametrize("cache", ["rows", "blocks"])
def test_no_configs(service: Service, cache: str, configs: Any) -> None:
    ready = Ready()
    task = call(service, cache, ready, configs)
    assert task.synchronize(WAIT_MS) == LLMStatusCode.LLM_SUCCESS
    assert task.get_results() == []
    assert not ready.asked


@pytest.mark.parametrize(
    "empty", [[], (), torch.empty(0, dtype=torch.int64)], ids=["[]", "()", "t"]
)
def test_empty_means_absent(service: Service, empty: Any) -> None:
    for size in (None, 0):
        task = call(service, "rows", Ready(), [FOUR], empty, empty, size)
        assert task.get_results(WAIT_MS) == [NYL]


def test_arguments_are_not_changed(service: Service) -> None:
    """Section 14, 37. Nor does it matter what becomes of them after the call."""
    configs: list[Any] = [FOUR, by_key(range(1), range(1, 2))]
    src, dst = [0, 1], [1, 0]
    before = copy.deepcopy([[vars(config) for config in configs], src, dst])
    assert configs[0].src_layer_range is None
    tasks = [
        call(service, "rows", Ready(), configs),
        call(service, "blocks", Ready(), configs, src, dst),
    ]
    for task in tasks:
        assert task.get_results(WAIT_MS) == [NYL, NYL]
    assert str([[vars(config) for config in configs], src, dst]) == str(before)


def test_the_key_says_which_peer(service: Service) -> None:
    """Its setter leaves ``dst_cluster_id`` behind."""
    config = by_key(range(1), range(1), cache_key=CacheKeyByIdAndIndex(1, 1))
    assert config.dst_cluster_id == NOT_LINKED
    # 1 is this very instance.
    assert call(service, "rows", Ready(), [config]).get_results(WAIT_MS) == [PI]


@pytest.mark.parametrize(
    "operation",
    [
        "transfer_cache_async",
        "pull_cache_async",
        "pull_blocks_async",
        "push_cache_async",
        "push_blocks_async",
    ],
)
def test_after_finalize(operation: str) -> None:
    service = Service()
    service.start(1)
    manager = service.manager
    service.finish()
    with pytest.raises(LLMParamError):
        getattr(manager, operation)(None, None, None)

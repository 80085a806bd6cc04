# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector, without vLLM."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_datadist_torch.vllm.params import Peer, prompt_digest
from llm_datadist_torch.vllm.scheduler import prompts
from llm_datadist_torch.vllm.scheduler.loads import MAX_KEPT, Decision, LoadDeduplicator
from llm_datadist_torch.vllm.scheduler.prompts import Prompts
from llm_datadist_torch.vllm.scheduler.pull import PullScheduler
from llm_datadist_torch.vllm.steps import Grant, Pull

PEERS = [Peer(5, "127.0.0.1", 7000, "life")]


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    mm_features: list[Any] = field(default_factory=list)
    lora_request: Any = None


def scheduler(**roles: bool) -> PullScheduler:
    roles = {"serves": True, "pulls": True} | roles
    made = PullScheduler("engine", 60.0, Prompts(), **roles)
    made.set_workers(PEERS, 1)
    return made


def handed_over(prompt: list[int], blocks: list[int], **further: Any) -> dict[str, Any]:
    """What a producer tells of a prompt, after a way through JSON."""
    request = Request("p", prompt, {"do_remote_decode": True}, len(prompt), **further)
    kept, params = scheduler().finished(request, (tuple(blocks),), completed=True)
    assert kept
    return json.loads(json.dumps(params))


def test_what_is_handed_over_is_pulled() -> None:
    prompt = list(range(300))
    params = handed_over(prompt, [4, 9, 2])
    consumer = scheduler()
    request = Request("d", prompt, params)
    assert consumer.num_matched(request, 0) == 300
    assert consumer.num_matched(request, 128) == 172, "it may be asked several times"
    consumer.allocated(request, ((1, 7, 8),), 172)
    (pull,) = consumer.take_step().pulls
    assert pull == Pull("d", pull.remote, ((1, 7, 8),), 128, 300)
    assert pull.remote.remote_peers == tuple(PEERS)
    assert pull.remote.remote_block_ids == ((4, 9, 2),)
    assert not consumer.take_step().pulls
    # The second call, a preemption, a failed load: computed here.
    consumer.allocated(request, ((1, 7, 8),), 0)
    assert consumer.num_matched(request, 0) == 0
    assert consumer.finished(request, ((1, 7, 8),), completed=True) == (False, None)
    assert not consumer.take_step().pulls


def test_fewer_tokens_are_taken_than_were_offered() -> None:
    """vLLM rounds some offers down to whole blocks."""
    prompt = list(range(300))
    consumer, request = scheduler(), Request("d", prompt, handed_over(prompt, [4, 9, 2]))
    assert consumer.num_matched(request, 128) == 172
    consumer.allocated(request, ((1, 7, 8),), 128)
    (pull,) = consumer.take_step().pulls
    assert (pull.first_token, pull.num_tokens) == (128, 256)


def test_leases_have_rising_numbers() -> None:
    producer = scheduler()
    for name in ("a", "b"):
        request = Request(name, [1, 2], {"do_remote_decode": True}, 2)
        producer.finished(request, ((3,),), completed=True)
    first, second = producer.take_step().grants
    assert (first, second) == (
        Grant(first.number, "a", ((3,),)),
        Grant(second.number, "b", ((3,),)),
    )
    assert second.number > first.number


def test_all_of_it_is_there_already() -> None:
    params = handed_over([1, 2, 3], [4])
    consumer = scheduler()
    request = Request("d", [1, 2, 3], params)
    assert consumer.num_matched(request, 3) == 0
    consumer.allocated(request, ((1,),), 0)
    (pull,) = consumer.take_step().pulls
    assert not pull.awaited, "only a release"
    assert not pull.local_blocks


def test_only_the_first_of_several_pulls_and_the_others_wait_for_it() -> None:
    params, consumer = handed_over([1, 2, 3], [4]), scheduler()
    first, second, late = (Request(name, [1, 2, 3], dict(params)) for name in "abc")
    assert consumer.num_matched(first, 0) == 3
    assert consumer.num_matched(second, 0) is None
    consumer.allocated(first, ((1,),), 3)
    assert consumer.num_matched(second, 0) is None, "it is still being loaded"
    (pull,) = consumer.take_step().pulls
    assert pull.request_id == "a"
    consumer.loaded(["other", "a"])
    for sibling in (second, late):
        assert consumer.num_matched(sibling, 0) == 0
        consumer.allocated(sibling, ((7,),), 0)
        assert consumer.finished(sibling, ((7,),), completed=True) == (False, None)
    assert not consumer.take_step().pulls, "it has been released by the first"


@pytest.mark.parametrize("how", ["aborted", "cached"])
def test_nobody_waits_for_a_first_that_pulls_nothing(how: str) -> None:
    params, consumer = handed_over([1, 2, 3], [4]), scheduler()
    first, second = (Request(name, [1, 2, 3], dict(params)) for name in "ab")
    consumer.num_matched(first, 0)
    assert consumer.num_matched(second, 0) is None
    if how == "aborted":
        consumer.finished(first, ((),), completed=False)
    else:
        consumer.allocated(first, ((1,),), 0)
    assert consumer.num_matched(second, 0) == 0
    (pull,) = consumer.take_step().pulls
    assert (pull.request_id, pull.awaited) == ("a", False)


def test_a_sibling_that_is_aborted_releases_nothing() -> None:
    params, consumer = handed_over([1, 2, 3], [4]), scheduler()
    first, second = (Request(name, [1, 2, 3], dict(params)) for name in "ab")
    consumer.num_matched(first, 0)
    consumer.num_matched(second, 0)
    assert consumer.finished(second, ((),), completed=False) == (False, None)
    assert not consumer.take_step().pulls, "the first is about to read"


def test_what_has_been_loaded_is_forgotten_in_the_end() -> None:
    loads = LoadDeduplicator()
    assert loads.decide(-1, "loading") is Decision.LOADS
    for number in range(MAX_KEPT + 1):
        assert loads.decide(number, str(number)) is Decision.LOADS
        loads.loaded([str(number)])
    assert loads.decide(0, "again") is Decision.LOADS
    assert loads.decide(1, "late") is Decision.COMPUTES
    assert loads.decide(-1, "late") is Decision.WAITS


def test_aborted_before_it_had_blocks() -> None:
    consumer = scheduler()
    params = handed_over([1, 2, 3], [4])
    lease = params["remote_lease"]
    request = Request("d", [1, 2, 3], params)
    assert consumer.finished(request, ((),), completed=False) == (False, None)
    (pull,) = consumer.take_step().pulls
    assert not pull.awaited
    assert pull.remote.remote_lease == lease


@pytest.mark.parametrize(
    ("prompt", "further"),
    [
        ([1, 2, 4], {}),
        ([1, 2], {}),
        ([1, 2, 3], {"lora_request": SimpleNamespace(lora_name="other")}),
        ([1, 2, 3], {"mm_features": [SimpleNamespace(identifier="image")]}),
        (None, {}),
    ],
)
def test_the_kv_of_another_prompt(
    prompt: list[int] | None, further: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    consumer = scheduler()
    request = Request("d", prompt, handed_over([1, 2, 3], [4]), **further)
    with caplog.at_level(logging.WARNING):
        assert consumer.num_matched(request, 0) == 0
    assert "had another prompt" in caplog.text
    (pull,) = consumer.take_step().pulls
    assert not pull.awaited, "the producer need not keep it"
    assert consumer.num_matched(request, 0) == 0


@pytest.mark.parametrize(
    "broken",
    [
        {"remote_lease": "one"},
        {"remote_peers": []},
        {"remote_peers": [[5, "127.0.0.1", 7000, "life"]] * 5000, "remote_tp_size": 5000},
        {"remote_peers": [[5, "127.0.0.1"]]},
        {"remote_peers": [[5, "127.0.0.1", 7000]]},
        {"remote_tp_size": 2},
        {"remote_tp_size": 0},
        {"remote_lease_s": 0.0},
        {"remote_lease_s": -1},
        {"remote_lease_s": 1e300},
        {"remote_block_ids": None},
        {"remote_num_tokens": -1},
        {"prompt": 7},
    ],
)
def test_params_that_are_none(broken: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    consumer = scheduler()
    request = Request("d", [1, 2, 3], handed_over([1, 2, 3], [4]) | broken)
    with caplog.at_level(logging.WARNING):
        assert consumer.num_matched(request, 0) == 0
    assert "kv_transfer_params" in caplog.text
    assert not consumer.take_step().pulls


@pytest.mark.parametrize(
    ("params", "blocks", "completed", "roles"),
    [
        (None, [1], True, {}),
        ({}, [1], True, {}),
        ({"do_remote_decode": False}, [1], True, {}),
        ({"do_remote_decode": True}, [1], False, {}),
        ({"do_remote_decode": True}, [], True, {}),
        ({"do_remote_decode": True}, [1], True, {"serves": False}),
    ],
)
def test_what_is_not_kept(
    params: dict[str, Any] | None, blocks: list[int], completed: bool, roles: dict[str, bool]
) -> None:
    producer = scheduler(**roles)
    request = Request("p", [1, 2], params, 2)
    assert producer.finished(request, (tuple(blocks),), completed=completed) == (False, None)
    assert not producer.take_step().grants


def test_nothing_is_kept_before_it_is_known_where() -> None:
    producer = PullScheduler("engine", 60.0, Prompts(), serves=True, pulls=False)
    request = Request("p", [1, 2], {"do_remote_decode": True}, 2)
    assert producer.finished(request, ((1,),), completed=True) == (False, None)
    assert not producer.take_step().grants


def test_a_producer_pulls_nothing() -> None:
    request = Request("d", [1, 2, 3], handed_over([1, 2, 3], [4]))
    assert scheduler(pulls=False).num_matched(request, 0) == 0


def test_a_request_that_waits_holds_its_lease() -> None:
    """From its arrival on, and at the latest when the engine looks whether it may load."""
    consumer = scheduler()
    first, second = (Request(name, [1, 2, 3], handed_over([1, 2, 3], [4])) for name in ("a", "b"))
    second.kv_transfer_params["remote_lease"] = 9
    consumer.arrived(first)
    (renewal,) = consumer.take_step().renewals
    assert (renewal.request_id, renewal.remote.remote_lease) == ("a", 1)
    consumer.num_matched(first, 0)
    consumer.num_matched(second, 0)
    assert [each.request_id for each in consumer.take_step().renewals] == ["b"]
    assert consumer.finished(first, ((),), completed=False) == (False, None)
    assert consumer.take_step().drops == ["a"]


def test_what_is_pulled_at_once_is_not_claimed_before() -> None:
    consumer = scheduler()
    request = Request("d", [1, 2, 3], handed_over([1, 2, 3], [4]))
    consumer.arrived(request)
    consumer.num_matched(request, 0)
    consumer.allocated(request, ((1,),), 3)
    step = consumer.take_step()
    assert not step.renewals
    assert [pull.request_id for pull in step.pulls] == ["d"]


def test_a_lease_that_is_lost_while_the_request_waits(caplog: pytest.LogCaptureFixture) -> None:
    """It is computed here, before blocks are allocated for a load, and so are those behind it."""
    consumer, params = scheduler(), handed_over([1, 2, 3], [4])
    first, second = (Request(name, [1, 2, 3], dict(params)) for name in "ab")
    consumer.arrived(first)
    assert consumer.num_matched(first, 0) == 3
    assert consumer.num_matched(second, 0) is None
    with caplog.at_level(logging.WARNING):
        consumer.lost(["a", "unknown"])
    assert "has given up its blocks while it waited" in caplog.text
    assert consumer.num_matched(first, 0) == 0
    consumer.allocated(first, ((1,),), 0)
    assert consumer.num_matched(second, 0) == 0
    consumer.take_step()
    assert consumer.finished(first, ((1,),), completed=True) == (False, None)
    assert not consumer.take_step().pulls, "there is nothing to release"


def test_a_digest_once_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []

    def digest(token_ids: list[int], further: list[str]) -> str:
        digests.append(token_ids)
        return prompt_digest(token_ids, further)

    consumer = scheduler()
    monkeypatch.setattr(prompts, "prompt_digest", digest)
    waiting = Request("d", [1, 2, 3], handed_over([1, 2, 3], [4]))
    digests.clear()
    consumer.arrived(waiting)
    for _ in range(5):
        consumer.num_matched(waiting, 0)
    assert len(digests) == 1
    consumer.finished(waiting, ((),), completed=False)
    assert not consumer._prompts._digests


def test_digests_are_of_values() -> None:
    digest = prompt_digest([1, 200, 70_000])
    assert digest == prompt_digest((1, 200, 70_000))
    assert digest == prompt_digest(list(torch.tensor([1, 200, 70_000]).numpy()))
    others = ([1, 200], [200, 1, 70_000], [1, 200, 70_000, 0], [1, 200, 70_001], [])
    assert len({digest, *map(prompt_digest, others)}) == len(others) + 1


def test_adapters_and_pictures_are_part_of_a_prompt() -> None:
    made = Prompts(lambda request: request.lora_name + request.content)

    def digest(**further: Any) -> str | None:
        made.forget("r")
        return made.digest(Request("r", [1, 2], **further))

    def adapter(content: str) -> SimpleNamespace:
        return SimpleNamespace(lora_name="x", content=content)

    found = [
        digest(),
        digest(lora_request=adapter("a")),
        digest(lora_request=adapter("b")),
        digest(mm_features=[SimpleNamespace(identifier="cat")]),
        digest(mm_features=[SimpleNamespace(identifier="dog")]),
    ]
    assert len(set(found)) == len(found)
    assert digest(lora_request=adapter("a")) == found[1]


@dataclass
class Shortened(Request):
    """What is used of vLLM's request besides, where a prompt is shortened."""

    max_tokens: int = 7
    num_prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self._all_token_ids = list(self.prompt_token_ids or ())
        self.num_prompt_tokens = len(self._all_token_ids)


def test_states_are_of_the_token_before_the_last() -> None:
    """The producer does not compute the last token, which the consumer computes in any case."""
    producer = PullScheduler("engine", 60.0, Prompts(back_off=1), serves=True, pulls=False)
    producer.set_workers(PEERS, 1)
    request = Shortened("p", [1, 2, 3, 4], {"do_remote_decode": True})
    for _ in range(2):
        producer.shorten(request, 1)
    assert (request.prompt_token_ids, request._all_token_ids) == ([1, 2, 3], [1, 2, 3])
    assert (request.num_prompt_tokens, request.max_tokens) == (3, 1)
    request.num_computed_tokens = 3
    kept, params = producer.finished(request, ((4,), (5,)), completed=True)
    assert kept
    consumer = PullScheduler("engine", 60.0, Prompts(back_off=1), serves=False, pulls=True)
    wants = Shortened("d", [1, 2, 3, 4], params)
    consumer.shorten(wants, 1)
    assert consumer.num_matched(wants, 0) == 3, "its digest is of the whole prompt"


def test_a_reset_ends_what_is_kept() -> None:
    producer = scheduler()
    producer.reset()
    assert producer.take_step().reset
    assert not producer.take_step().reset

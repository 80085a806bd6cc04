# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of the connector with "push", without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llm_datadist_torch.vllm.params import Peer, prompt_digest
from llm_datadist_torch.vllm.scheduler.prompts import Prompts
from llm_datadist_torch.vllm.scheduler.push import PushScheduler
from llm_datadist_torch.vllm.steps import PushEnd, Step

PEERS = [[5, "127.0.0.1", 7000]]
BLOCK = 16


def request(wish: str, num_tokens: int = 40, **params: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=list(range(num_tokens)),
        num_computed_tokens=0,
        kv_transfer_params={wish: True, "transfer_id": "t"} | params,
        mm_features=[],
        lora_request=None,
    )


def scheduler(**roles: bool) -> PushScheduler:
    return PushScheduler(Prompts(), **({"sends": True, "receives": True} | roles))


def output(
    *,
    new: tuple[list[int], int] | None = None,
    cached: tuple[list[int] | None, int] | None = None,
    resumed: bool = False,
    tokens: int = 0,
    preempted: set[str] | None = None,
) -> Any:
    """A step in which the request gets blocks, has computed tokens, and computes some more."""
    of_new = [] if new is None else [("r", (new[0],), new[1])]
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=blocks, num_computed_tokens=computed)
            for name, blocks, computed in of_new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[] if cached is None else ["r"],
            resumed_req_ids={"r"} if resumed else set(),
            new_block_ids=[] if cached is None else [None if cached[0] is None else (cached[0],)],
            num_computed_tokens=[] if cached is None else [cached[1]],
        ),
        num_scheduled_tokens={"r": tokens},
        preempted_req_ids=preempted,
    )


def pushed(step: Step) -> list[tuple[tuple[int, ...], int, int, bool]]:
    return [(push.blocks[0], push.first_token, push.num_tokens, push.last) for push in step.pushes]


def test_a_prompt_in_one_step() -> None:
    producer, wanted = scheduler(), request("do_remote_decode", remote_peers=PEERS)
    producer.allocated(wanted, ((3, 1, 2),), 0)
    step = producer.take_step(output(new=([3, 1, 2], 0), tokens=40))
    (push,) = step.pushes
    assert pushed(step) == [((3, 1, 2), 0, 40, True)]
    assert (push.transfer_id, push.peers) == ("t", (Peer(5, "127.0.0.1", 7000),))
    assert push.prompt == prompt_digest(range(40))
    assert not producer.take_step(output(cached=(None, 40), tokens=1)).pushes
    assert producer.finished(wanted, ((3, 1, 2),), completed=True) == (True, None)
    assert producer.take_step(output()).push_ends == [PushEnd("r", "t", push.peers)]


def test_in_chunks() -> None:
    producer, wanted = scheduler(), request("do_remote_decode", 60, remote_peers=PEERS)
    producer.allocated(wanted, ((3,),), 0)
    step = producer.take_step(output(new=([3], 0), tokens=10))
    assert pushed(step) == [((3,), 0, 10, False)]
    step = producer.take_step(output(cached=([1, 2], 10), tokens=25))
    assert pushed(step) == [((3, 1, 2), 10, 35, False)]
    step = producer.take_step(output(cached=([7], 35), tokens=20))
    assert pushed(step) == [((3, 1, 2, 7), 35, 55, False)]
    step = producer.take_step(output(cached=(None, 55), tokens=5))
    assert pushed(step) == [((3, 1, 2, 7), 55, 60, True)]


def test_what_was_cached_goes_out_too() -> None:
    producer, wanted = scheduler(), request("do_remote_decode", remote_peers=PEERS)
    producer.allocated(wanted, ((3, 1, 2),), 0)
    step = producer.take_step(output(new=([3, 1, 2], 32), tokens=8))
    assert pushed(step) == [((3, 1, 2), 0, 40, True)]


def test_preempted_and_computed_again() -> None:
    producer, wanted = scheduler(), request("do_remote_decode", remote_peers=PEERS)
    producer.allocated(wanted, ((3, 1),), 0)
    step = producer.take_step(output(new=([3, 1], 0), tokens=20))
    assert pushed(step) == [((3, 1), 0, 20, False)]
    step = producer.take_step(output(preempted={"r", "another"}))
    assert step.preempted == ("r",)
    producer.allocated(wanted, ((8, 9, 6),), 0)
    step = producer.take_step(output(cached=([8, 9, 6], 0), resumed=True, tokens=40))
    assert pushed(step) == [((8, 9, 6), 0, 40, True)], "all of it, from the new blocks"


@pytest.mark.parametrize(
    ("params", "roles"),
    [
        ({}, {"sends": True}),
        ({"remote_peers": PEERS}, {"sends": False}),
        ({"remote_peers": PEERS, "transfer_id": 7}, {"sends": True}),
    ],
)
def test_what_is_not_sent(params: dict[str, Any], roles: dict[str, bool]) -> None:
    producer, wanted = scheduler(**roles), request("do_remote_decode", **params)
    producer.allocated(wanted, ((3, 1, 2),), 0)
    assert not producer.take_step(output(new=([3, 1, 2], 0), tokens=40)).pushes
    assert producer.finished(wanted, ((3, 1, 2),), completed=True) == (False, None)


def test_a_consumer_expects_what_it_has_not() -> None:
    consumer, wanted = scheduler(), request("do_remote_prefill")
    assert consumer.num_matched(wanted, 16) == 24
    consumer.allocated(wanted, ((4, 5, 6),), 24)
    (expect,) = consumer.take_step(output()).expects
    assert (expect.blocks, expect.first_token, expect.num_tokens) == (((4, 5, 6),), 16, 40)
    assert expect.prompt == prompt_digest(range(40))
    assert consumer.num_matched(wanted, 0) == 0, "once per request"
    assert consumer.finished(wanted, ((4, 5, 6),), completed=True) == (False, None)


def test_fewer_tokens_are_taken_than_were_offered() -> None:
    consumer, wanted = scheduler(), request("do_remote_prefill")
    assert consumer.num_matched(wanted, 16) == 24
    consumer.allocated(wanted, ((4, 5),), 16)
    (expect,) = consumer.take_step(output()).expects
    assert (expect.first_token, expect.num_tokens) == (16, 32)


def test_a_consumer_that_wants_nothing_says_so() -> None:
    consumer, wanted = scheduler(), request("do_remote_prefill")
    assert consumer.num_matched(wanted, 40) == 0
    consumer.allocated(wanted, ((4, 5, 6),), 0)
    (expect,) = consumer.take_step(output()).expects
    assert expect.blocks == ()
    aborted = request("do_remote_prefill")
    consumer.num_matched(aborted, 0)
    assert consumer.finished(aborted, ((),), completed=False) == (False, None)
    (expect,) = consumer.take_step(output()).expects
    assert expect.blocks == ()


def test_a_producer_that_ends_before_it_had_blocks_says_so() -> None:
    producer, wanted = scheduler(), request("do_remote_decode", remote_peers=PEERS)
    assert producer.finished(wanted, ((),), completed=False) == (False, None)
    assert producer.take_step(output()).push_ends == [
        PushEnd("r", "t", (Peer(5, "127.0.0.1", 7000),), kept=False)
    ]


def test_blocks_are_written_for_the_first_of_several() -> None:
    consumer, first, second = (
        scheduler(),
        request("do_remote_prefill"),
        request("do_remote_prefill"),
    )
    second.request_id = "s"
    assert consumer.num_matched(first, 0) == 40
    assert consumer.num_matched(second, 0) is None
    consumer.allocated(first, ((4, 5, 6),), 40)
    consumer.loaded(["r"])
    assert consumer.num_matched(second, 0) == 0
    consumer.allocated(second, ((7, 8, 9),), 0)
    assert [each.request_id for each in consumer.take_step(output()).expects] == ["r"]


def test_a_consumer_that_is_aborted_while_blocks_come_gives_them_up() -> None:
    consumer, wanted = scheduler(), request("do_remote_prefill")
    consumer.num_matched(wanted, 0)
    consumer.allocated(wanted, ((4, 5, 6),), 40)
    assert consumer.take_step(output()).expects[0].blocks
    assert consumer.finished(wanted, ((4, 5, 6),), completed=False) == (False, None)
    (expect,) = consumer.take_step(output()).expects
    assert (expect.transfer_id, expect.blocks) == ("t", ())
    assert consumer.finished(wanted, ((4, 5, 6),), completed=False) == (False, None)
    assert not consumer.take_step(output()).expects

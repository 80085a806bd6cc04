# SPDX-License-Identifier: Apache-2.0
"""Linking by rank table: arguments and rank tables (reference API, 11.4)."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist_torch import LLMDataDist, LLMException, LLMRole, LLMStatusCode, RegisterMemStatus
from llm_datadist_torch.links.communicators import MAX_COMMUNICATORS
from llm_datadist_torch.links.rank_table import meeting_hosts, members_of, port_of
from tests.peers import Service, eventually
from tests.transfer.tables import device, server, table

pytestmark = pytest.mark.same_on_every_device

PI = LLMStatusCode.LLM_PARAM_INVALID
TABLE = table(server("0", device(0), device(1), device(2), device(3)))
TWO = {1: 0, 2: 1}
SECOND = {2: 0, 1: 1}


# -- arguments ------------------------------------------------------------------------------------

ROWS = {
    # each row breaks everything that comes after what it is about, too
    "no name": ((None, None, None), TypeError),
    "name of a wrong type": ((b"n", 1, 1), TypeError),
    "empty name": (("", 1, 1), PI),
    "long name": (("n" * 128, 1, 1), PI),
    "no dict": (("n", None, 1), AttributeError),
    "a list": (("n", [1, 2], 1), TypeError),
    "id of a wrong type": (("n", {"1": 0, 2: 1}, 1), TypeError),
    "rank of a wrong type": (("n", {1: 0, 2: "1"}, 1), TypeError),
    "five members": (("n", {1: -1, 2: 1, 3: 2, 4: 3, 5: 4}, 1), PI),
    "id too large": (("n", {2**64: 0}, 1), ValueError),
    "negative id": (("n", {-1: 0}, 1), ValueError),
    "rank too large": (("n", {1: 2**32}, 1), ValueError),
    "negative rank": (("n", {1: -1}, 1), ValueError),
    "no table": (("n", {1: 0}, None), TypeError),
    "table of a wrong type": (("n", {1: 0}, {}), TypeError),
    "no member": (("n", {}, "{"), PI),
    "one member": (("n", {1: 0}, "{"), PI),
    "not ascending": (("n", {1: 1, 2: 0}, "{"), PI),
    "broken table": (("n", TWO, "{"), PI),
    "not a member": (("n", {2: 0, 3: 1}, TABLE), PI),
}


@pytest.mark.parametrize(("args", "error"), ROWS.values(), ids=ROWS)
def test_arguments(here: Service, args: tuple[Any, ...], error: Any) -> None:
    here.start(1)
    if isinstance(error, LLMStatusCode):
        with pytest.raises(LLMException) as caught:
            here.dd.link(*args)
        assert caught.value.status_code == error
    else:
        with pytest.raises(error):
            here.dd.link(*args)
    # Nothing was begun: ids are not used up.
    assert here.dd.link("n", TWO, TABLE) == 1


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"timeout": "1"}, TypeError),
        ({"timeout": 2**31}, ValueError),
        ({"timeout": 0}, PI),
        ({"rendezvous": 1}, TypeError),
        ({"rendezvous": "here"}, PI),
        ({"rendezvous": "localhost:1"}, PI),
        ({"rendezvous": "127.0.0.1:65536"}, PI),
        ({"wait": 1}, TypeError),
    ],
)
def test_keywords(here: Service, keywords: dict[str, Any], error: Any) -> None:
    here.start(1)
    if isinstance(error, LLMStatusCode):
        with pytest.raises(LLMException) as caught:
            here.dd.link("n", TWO, TABLE, **keywords)
        assert caught.value.status_code == error
    else:
        with pytest.raises(error):
            here.dd.link("n", TWO, TABLE, **keywords)


def test_not_initialised_comes_first() -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    for call in (
        lambda: datadist.link(None, None, None),  # type: ignore[arg-type]
        lambda: datadist.unlink(None),  # type: ignore[arg-type]
        lambda: datadist.query_register_mem_status(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(RuntimeError, match="init"):
            call()


@pytest.mark.parametrize("method", ["unlink", "query_register_mem_status"])
def test_comm_ids(here: Service, method: str) -> None:
    here.start(1)
    call = getattr(here.dd, method)
    for wrong, error in (
        (None, TypeError),
        ("1", TypeError),
        (-1, ValueError),
        (2**64, ValueError),
    ):
        with pytest.raises(error):
            call(wrong)
    with pytest.raises(LLMException) as caught:
        call(1)
    assert caught.value.status_code == LLMStatusCode.LLM_NOT_YET_LINK


def test_too_many_communicators(here: Service) -> None:
    here.start(1)
    ids = [here.dd.link(f"n{i}", SECOND, TABLE) for i in range(MAX_COMMUNICATORS)]
    assert ids == list(range(1, MAX_COMMUNICATORS + 1))
    with pytest.raises(LLMException) as caught:
        here.dd.link("n", SECOND, TABLE)
    assert caught.value.status_code == PI
    assert here.dd.query_register_mem_status(512) == RegisterMemStatus.PREPARING
    for comm_id in ids:
        here.dd.unlink(comm_id)
    assert here.dd.link("n", SECOND, TABLE) == MAX_COMMUNICATORS + 1
    assert eventually(lambda: here.instance.communicators.preparing == 1)


@pytest.mark.parametrize("name", ["{braces}", "new\nline", "名字", "\udc80", "n" * 127, "a/b c"])
def test_names(here: Service, name: str) -> None:
    here.start(1)
    comm_id = here.dd.link(name, TWO, TABLE, timeout=100)
    assert eventually(
        lambda: here.dd.query_register_mem_status(comm_id) == RegisterMemStatus.FAILED
    )
    assert 16384 <= port_of(name) < 32768


def test_switch_role_while_linking(here: Service) -> None:
    here.start(1)
    comm_id = here.dd.link("n", TWO, TABLE)
    with pytest.raises(LLMException) as caught:
        here.dd.switch_role(LLMRole.PROMPT)
    assert caught.value.status_code == LLMStatusCode.LLM_EXIST_LINK
    here.dd.unlink(comm_id)
    here.dd.switch_role(LLMRole.PROMPT)


# -- rank tables ----------------------------------------------------------------------------------

NEAR, FAR = server("0", device(0), host_ip="10.0.0.1"), server("1", device(1))
NUMBERS = [{"server_id": 0, "device": [{"rank_id": 0}, {"rank_id": 1}]}]
POD = {"version": "1.2", "super_pod_list": [{"super_pod_id": "0"}]}

LOOPBACK = "127.0.0.1"
HOSTS = {
    "host_ip": (table(NEAR, FAR), ["10.0.0.1"]),
    "version 1.2": (table(NEAR, server("1", device(1, super_device_id="7")), **POD), ["10.0.0.1"]),
    "IPv6": (table(server("0", device(0), host_ip="fd00::1"), FAR), ["fd00::1"]),
    "server_id": (
        table(server("10.0.0.2", device(0)), server("10.0.0.3", device(1))),
        ["10.0.0.2", LOOPBACK],
    ),
    "one server": (table(server("node", device(0), device(1))), [LOOPBACK]),
    "device_ip": (table(server("1", device(0)), server("2", device(1))), ["192.168.0.0", LOOPBACK]),
    "other order": (table(FAR, NEAR), ["10.0.0.1"]),
    "numbers": (table(server_list=NUMBERS, server_count=1), [LOOPBACK]),
    "no address": (
        table(server("0", device(0, device_ip="")), server("1", device(1))),
        [LOOPBACK],
    ),
}


@pytest.mark.parametrize(("text", "hosts"), HOSTS.values(), ids=HOSTS)
def test_where_they_meet(text: str, hosts: list[str]) -> None:
    assert meeting_hosts(text, members_of(TWO)) == hosts


def test_members_are_in_one_order() -> None:
    assert members_of({9: 0, 3: 0, 5: 1}) == members_of({3: 0, 9: 0, 5: 1})


BROKEN = {
    "empty": "",
    "no JSON": "{",
    "no object": "[]",
    "deep": "[" * 100_000,
    "lone surrogate": '"\udc80"',
    "no servers": '{"version": "1.0"}',
    "servers of a wrong type": '{"version": "1.0", "server_list": 1}',
    "version": table(server("0", device(0), device(1)), version="2.0"),
    "status": table(server("0", device(0), device(1)), status="initializing"),
    "count": table(server("0", device(0), device(1)), server_count="2"),
    "rank twice": table(server("0", device(0), device(0), device(1))),
    "rank missing": table(server("0", device(0), device(2))),
    "host_ip": table(server("0", device(0), device(1), host_ip="node-{0}")),
    "host_ip too short": table(server("0", device(0), device(1), host_ip="1")),
    "device_ip": table(server("0", device(0, device_ip="x"), device(1))),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_tables(text: str) -> None:
    with pytest.raises(LLMException, match="rank_table") as caught:
        meeting_hosts(text, members_of(TWO))
    assert caught.value.status_code == PI

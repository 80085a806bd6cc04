# SPDX-License-Identifier: Apache-2.0
"""Where workers listen, and what peers are told."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from llm_datadist_torch import LLMParamError
from llm_datadist_torch.vllm import addresses
from llm_datadist_torch.vllm.settings import Settings
from tests.vllm_parts.workers import Worker


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("0.0.0.0", "0.0.0.0"),
        ("interface:lo", "127.0.0.1"),
        ("subnet:127.0.0.0/8", "127.0.0.1"),
        ("env:WHERE_TO_LISTEN", "127.0.0.7"),
    ],
)
def test_forms(text: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE_TO_LISTEN", "127.0.0.7")
    assert addresses.local_address(text) == address


def test_names_are_looked_up() -> None:
    assert addresses.local_address("localhost") in ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("interface:nosuch0", "no address of this host, which has .*127.0.0.1 .lo."),
        ("subnet:203.0.113.0/24", "no address of this host"),
        ("env:NOT_SET_ANYWHERE", "variable NOT_SET_ANYWHERE is not set"),
        ("no.such.host.invalid", "has no address"),
        ("0.0.0.0", 'set "advertise"'),
        ("::", 'set "advertise"'),
    ],
)
def test_hosts_that_are_none(host: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)worker of rank 3: .*{reason}"):
        Settings.of({"host": host}).at_rank(3)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"port": 65534}, "port=65534 makes 65537 for the worker of rank 3"),
        ({"cluster_id": 2**52}, "for the worker of rank 3"),
    ],
)
def test_sums_with_the_rank(extra: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings.of(extra).at_rank(3)
    Settings.of(extra).at_rank(0)


def test_one_json_for_all_workers() -> None:
    given = Settings.of({"port": 7000, "cluster_id": 5, "host": "0.0.0.0", "advertise": "node1"})
    endpoint = given.at_rank(2)
    assert (endpoint.port, endpoint.cluster_id) == (7002, 7)
    assert (endpoint.listen, endpoint.advertised) == ("0.0.0.0", "node1")


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "::1"},
        {"host": "[::1]"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "advertise": "localhost"},
        {"host": "::", "advertise": "::1"},
        {"host": "interface:lo"},
    ],
)
def test_blocks_move_between_such_addresses(
    worker: Callable[..., Worker], settings: dict[str, str]
) -> None:
    if ":" in addresses.local_address(settings["host"]) and not socket.has_ipv6:
        return
    p, d = worker(8, 1, **settings), worker(8, 2)
    assert not d.pull(p.grant([1], 32), [3], 0, 32)


@pytest.mark.parametrize(
    ("setting", "text", "number"), [("port", "7000", "7000"), ("timeout_s", "2.5", "2.5")]
)
def test_a_number_in_quotes_says_what_to_write(setting: str, text: str, number: str) -> None:
    with pytest.raises(LLMParamError) as caught:
        Settings.of({setting: text})
    assert f'write "{setting}": {number}, without quotes' in str(caught.value)

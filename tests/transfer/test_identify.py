# SPDX-License-Identifier: Apache-2.0
"""``LLMDataDist.identify``: who listens at an address."""

from __future__ import annotations

import pytest

from llm_datadist_torch import (
    LLMLinkError,
    LLMParamError,
    LLMTimeoutError,
)
from tests.peers import Service
from tests.transfer.helpers import OK, Peers, free_port
from tests.transfer.test_links import listening

pytestmark = pytest.mark.same_on_every_device

SECRET = {"llm.LinkSecret": "a secret of enough characters"}


@pytest.fixture
def node(here: Service) -> Service:
    here.start(7)
    return here


def test_the_id_of_a_listener_is_found_without_a_link(node: Service, peers: Peers):
    other = peers()
    port = other.call("start", 2**63 + 5)
    for _ in range(3):
        assert node.dd.identify("127.0.0.1", port, 5000) == 2**63 + 5
    assert node.dd.links() == []
    assert other.call("link_states") == {}
    assert node.link(2**63 + 5, port) == OK
    assert node.dd.identify("127.0.0.1", port, 5000) == 2**63 + 5
    assert other.call("link_states") == {7: "linked"}


def test_itself(node: Service):
    host, port = node.dd.listen_address
    assert node.dd.identify(host, port, 5000) == 7


def test_nobody_is_there(node: Service):
    with pytest.raises(LLMLinkError, match="refused"):
        node.dd.identify("127.0.0.1", free_port(), 5000)


def test_somebody_who_says_nothing(node: Service):
    with listening() as port, pytest.raises(LLMTimeoutError, match="200 ms"):
        node.dd.identify("127.0.0.1", port, 200)


def test_another_mode_is_refused_with_the_reason(node: Service, peers: Peers):
    port = peers().call("start", 1, remote=True)
    with pytest.raises(LLMParamError, match="enable_remote_cache_accessible"):
        node.dd.identify("127.0.0.1", port, 5000)


def test_another_secret_is_refused_with_the_reason(node: Service, peers: Peers):
    port = peers().call("start", 1, options=SECRET)
    with pytest.raises(LLMLinkError, match="link_secret"):
        node.dd.identify("127.0.0.1", port, 5000)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((None, 1), TypeError),
        (("127.0.0.1", "1"), TypeError),
        (("127.0.0.1", 65536), ValueError),
        (("127.0.0.1", 1, 0), LLMParamError),
    ],
)
def test_arguments(node: Service, arguments, error):
    with pytest.raises(error):
        node.dd.identify(*arguments)

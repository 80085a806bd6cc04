# SPDX-License-Identifier: Apache-2.0
"""``doctor --peer``: an instance in another process, examined from both ends by a third."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_datadist_torch.cli import loopback
from llm_datadist_torch.cli.peer import limits
from llm_datadist_torch.cli.report import Finding
from llm_datadist_torch.net.framing import Preamble
from llm_datadist_torch.observe.instance_report import Limits
from tests.compat.programs import run_module
from tests.faults.test_network import network as network
from tests.front_door.service import NodeService
from tests.peers import Peer, spawn

pytestmark = pytest.mark.same_on_every_device

SIZES = {"layers": 2, "blocks": 8, "shape": (64, 64)}
SECRET = "correct horse battery staple"


class ExaminedNode(NodeService):
    def pretend_version(self, version: str) -> None:
        self.node.datadist._instance.links.endpoint.preamble = Preamble(False, version)

    def enter_network(self, namespace: str) -> None:
        from tests.service import Service

        Service.enter_network(self, namespace)  # type: ignore[arg-type]


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = spawn(ExaminedNode)
    yield made
    made.close()


def examined(address: str, status: int) -> dict[str, dict[str, Any]]:
    done = run_module("doctor", "--json", "--peer", address)
    assert done.returncode == status, done.stdout + done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)["instance"]}


def test_both_ends_of_a_link_on_one_host(peer: Peer) -> None:
    address = peer.call("open", device="cpu")
    peer.call("allocate", **SIZES, name="kv")
    before = peer.call("data")
    found = examined(address, 0)
    assert f"process {peer.pid} on " in found[address]["detail"]
    assert found["versions"]["detail"] == "llm_datadist_torch 0.1.0 on both"
    assert found["clock"]["state"] == "ok"  # both processes read one clock
    assert found["host memory"]["detail"] == "by local (same host), seen from both ends"
    assert found["transport local"]["detail"] == "both have it"
    assert found["secret"]["detail"] == "none; the link does not leave this host"
    assert found["pull"]["detail"].startswith("512.0 KiB of cache 1 on cpu in ")
    assert found["pull"]["detail"].endswith("by shared-mapping")
    assert "ulimit -n" in found["there: open files"]["detail"]
    assert "of 200 requests" in found["round trip"]["detail"]
    assert peer.call("data") == before
    # The link that was made for it has ended.
    assert peer.call("links") == {}


@pytest.mark.parametrize("remote_accessible", [True, False])
def test_either_mode(peer: Peer, remote_accessible: bool) -> None:
    address = peer.call("open", device="cpu", remote_accessible=remote_accessible)
    peer.call("allocate", **SIZES)
    found = examined(address, 0)
    assert "no blocks cache with a name" in found["pull"]["detail"]
    assert found["pull"]["remedy"] == "allocate it with name=, then run this again"


def test_transports_that_only_one_end_has(peer: Peer) -> None:
    found = examined(peer.call("open", device="cpu", transport="local"), 0)
    assert "there: its settings leave it out" in found["transport hixl"]["detail"]


def test_another_secret(peer: Peer) -> None:
    address = peer.call("open", device="cpu", link_secret=SECRET)
    found = examined(address, 3)
    assert found["port"]["state"] == "ok"
    assert found[address]["state"] == "wrong"
    assert "link_secret" in found[address]["detail"]


def test_another_version(peer: Peer) -> None:
    address = peer.call("open", device="cpu")
    peer.call("pretend_version", "0.0.9/1")
    found = examined(address, 3)
    assert "version 0.0.9" in found[address]["detail"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "can't be reached"),
        ("no-such-host.invalid:26000", "is not known"),
        ("nonsense", "nonsense"),
    ],
)
def test_nobody_there(address: str, words: str) -> None:
    found = examined(address, 3)
    assert found[address]["state"] == "wrong"
    assert words in found[address]["detail"]


@pytest.mark.needs_netns
def test_between_hosts(peer: Peer, network: tuple[str, str, Callable[[str], None]]) -> None:
    """Two hosts by network namespaces: the peer connects back over the network."""
    space, host, _ = network
    peer.call("enter_network", space)
    address = peer.call("open", device="cpu", listen=f"{host}:0", transport="local")
    peer.call("allocate", **SIZES, name="kv")
    found = examined(address, 0)
    assert found["port back"]["detail"] == "the peer can connect to a port of this host"
    assert found["secret"]["state"] == "note"
    assert found["host memory"]["detail"].startswith("by local (through the control connection")
    assert found["pull"]["detail"].endswith("by relay")


def test_limits_that_are_too_low() -> None:
    found = {finding.name: finding for finding in limits(Limits(256, 65536, 1 << 30), "there: ")}
    assert [finding.state for finding in found.values()] == ["note", "note", "ok"]
    assert found["there: open files"].remedy == "ulimit -n 65536"
    assert "1.0 GiB" in found["there: memory"].detail
    assert [finding.state for finding in limits(Limits(None, None, None))] == ["ok"] * 3


def test_a_loopback_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loopback.pull()
    assert (found.name, found.state) == ("loopback pull", "ok")
    assert found.detail.startswith("64.0 MiB within this process, bytes compared: ")
    monkeypatch.setattr(loopback.torch, "equal", lambda *_: False)
    assert loopback.pull() == Finding(
        "loopback pull", "wrong", "the bytes that came are not those that were sent"
    )

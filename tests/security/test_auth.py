# SPDX-License-Identifier: Apache-2.0
"""Links with a secret: who is let in, what the others are told, and what shows on the wire."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import threading
from typing import Any

import pytest

from llm_datadist_torch import LLMException
from llm_datadist_torch.net import tls, unix
from llm_datadist_torch.net.connection import Connection
from llm_datadist_torch.net.framing import Unreadable
from llm_datadist_torch.net.tls import LinkKeys
from llm_datadist_torch.serving import messages
from tests.faults.helpers import ME, OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Service, eventually
from tests.wire import stranger

TEXT = "correct horse battery staple"
SECRET = {"options": {"llm.LinkSecret": TEXT}}
OTHER = {"options": {"llm.LinkSecret": "another horse, another staple"}}
FAILED = ("LLM_LINK_FAILED", ["LLM_LINK_FAILED"])


def test_a_shared_secret(here: Service, peers: Peers) -> None:
    port = start_peer(peers(), 7, **SECRET)
    start_here(here, **SECRET)
    assert here.link(PEER, port) == OK
    assert pull(here) is None
    assert here.colours("mine") == [7]


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [(SECRET, OTHER, "another link_secret"), (SECRET, {}, "this instance has none"),
     ({}, SECRET, "this instance has a link_secret|it has another link_secret, or none")],
    ids=["differs", "only there", "only here"],
)  # fmt: skip
def test_secrets_that_differ(
    here: Service, theirs: dict, ours: dict, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    near = Service()
    try:
        port = near.start(PEER, **theirs)
        start_here(here, **ours)
        # Not a timeout: there is an hour for it.
        assert here.link(PEER, port, 3_600_000) == FAILED
        told = [r.message for r in caplog.records if "linking cluster 2 failed" in r.message]
        assert len(told) == 1
        assert any(part in told[0] for part in text.split("|"))
        assert "Remedy: give all instances the same LLMConfig.link_secret" in told[0]
        assert not near.link_states()
        assert eventually(lambda: "refused a connection" in caplog.text) or not theirs
    finally:
        near.finish()


def test_a_client_key_that_is_not_ours(here: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Even somebody who has the listener's certificate has to have the dialer's key, too."""
    port = start_here(here, **SECRET)
    keys = LinkKeys.from_secret(TEXT)
    with stranger(port, keys) as speaker:
        assert isinstance(speaker.request(messages.Unlink()), messages.Refused)
    # It trusts the right listener, and shows a certificate of its own.
    own = tls._certificate(bytes(32), "dialer")
    context = tls._context(ssl.PROTOCOL_TLS_CLIENT, own, keys.listener)
    impostor = dataclasses.replace(keys, contexts=(keys.contexts[0], context))
    with pytest.raises((OSError, Unreadable)), stranger(port, impostor) as speaker:
        speaker.request(messages.Unlink())
    assert eventually(lambda: "refused a connection" in caplog.text)


def stay_on_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process dials goes on over TCP, as if the peer were on another host."""

    def connect(loop: Any, connection: Connection, introduction: Any, done: Any) -> None:
        connection.not_local = "the test has it so"
        done()

    monkeypatch.setattr(unix, "connect", connect)


class Tap:
    """Passes connections on to a port, and keeps what the dialing side says."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard = bytearray()
        self.told = bytearray()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with self._listener:
            near = self._listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", self._port))
        for source, sink, kept in ((near, far, self.heard), (far, near, self.told)):
            threading.Thread(target=self._pass, args=(source, sink, kept), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@pytest.mark.parametrize("secret", [SECRET, {}], ids=["secret", "open"])
def test_what_is_captured_is_of_no_use(
    here: Service, peers: Peers, secret: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be read in it, and sent again it makes no link and disturbs none."""
    stay_on_tcp(monkeypatch)
    peer = peers()
    port = start_peer(peer, 7, **secret)
    start_here(here, **secret)
    tap = Tap(port)
    assert here.link(PEER, tap.port) == OK
    assert pull(here) is None
    wire = bytes(tap.heard) + bytes(tap.told)
    assert (b"Resolve" in wire) is (not secret)
    assert (b"Hello" in wire) is (not secret)
    said = bytes(tap.heard)
    for whole in (said, said[:200], said[: len(said) // 2]):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as again:
            again.sendall(whole)
            again.settimeout(0.3)
            with_answer = b""
            try:
                while data := again.recv(1 << 16):
                    with_answer += data
            except OSError:
                pass
            assert b"Welcome" not in with_answer
    assert peer.call("link_states") == {ME: "linked"}
    here.paint("mine", 0)
    assert pull(here) is None
    assert here.colours("mine") == [7]
    assert eventually(lambda: peer.call("counters")["leases"] == 0)


def test_relink_needs_the_secret_too(here: Service, peers: Peers) -> None:
    first = peers()
    port = start_peer(first, 7, **SECRET)
    start_here(here, **SECRET)
    assert here.link(PEER, port) == OK
    first.kill()
    assert eventually(lambda: here.link_states() == {PEER: "lost"})
    impostor = peers()
    start_peer(impostor, 9, listen=f"127.0.0.1:{port}", **OTHER)
    assert pull(here).status == "LLM_NOT_YET_LINK"
    assert here.colours("mine") != [9]
    impostor.kill()
    start_peer(peers(), 8, listen=f"127.0.0.1:{port}", **SECRET)
    assert eventually(lambda: pull(here) is None)
    assert here.colours("mine") == [8]


TABLE = """{"version": "1.0", "status": "completed", "server_list": [{"server_id": "0", "device": [
{"device_ip": "", "rank_id": "0"}, {"device_ip": "", "rank_id": "1"}]}]}"""


def by_table(services: list[Service], timeout: int) -> list[str | None]:
    ids = [s.begin_link_by_table("meeting", {ME: 0, PEER: 1}, TABLE, timeout) for s in services]
    failures = []
    for service, comm_id in zip(services, ids, strict=True):
        try:
            service.dd._instance.communicators.wait(comm_id)
            failures.append(None)
        except LLMException as error:
            failures.append(str(error))
    return failures


@pytest.mark.parametrize(
    ("theirs", "fault"),
    [(SECRET, ""), (OTHER, "another link_secret"), ({}, "link_secret, and this instance has none")],
    ids=["same", "differs", "none"],
)
def test_a_meeting(here: Service, theirs: dict, fault: str) -> None:
    here.start(ME, **SECRET)
    near = Service()
    try:
        near.start(PEER, **theirs)
        failures = by_table([here, near], 20_000 if not fault else 1500)
        if not fault:
            assert failures == [None, None]
            assert here.link_states() == {PEER: "linked"}
        else:
            assert "did not come" in failures[0]
            assert fault in failures[1]
            assert not here.link_states()
    finally:
        near.finish()

# SPDX-License-Identifier: Apache-2.0
"""Which transports an instance gets, those of others included, and what a wrong wish is told."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, LLMFeatureNotEnabledError, LLMParamError, LLMRole
from llm_datadist_torch.transports.registry import (
    known_transports,
    open_transports,
    why_unavailable,
)
from llm_datadist_torch.values.config import EngineConfig
from tests.conftest import InstanceFactory
from tests.peers import Peer, Ref, Service, cluster, eventually
from tests.transfer.helpers import OK
from tests.transports.conftest import EXAMPLE

CPU = torch.device("cpu")


def config(**fields):
    return EngineConfig(LLMRole.MIX, **fields)


def install(directory: Path, entry: str, code: str = "") -> None:
    """A package with one entry point, on a directory of the path."""
    info = directory / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[llm_datadist_torch.transports]\n{entry}\n")
    (directory / "other_transport.py").write_text(code)


def test_on_a_plain_machine():
    opened = open_transports(config(), CPU)
    assert opened.names in (["local"], ["local", "nixl"])
    assert "No module named 'hixl'" in opened.unavailable["hixl"]


@pytest.mark.parametrize(
    ("wanted", "kind", "text"),
    [
        ("nothing", LLMParamError, "there is no transport 'nothing', only hixl, local, nixl"),
        ("", LLMParamError, "there is no transport ''"),
        ("hixl", LLMFeatureNotEnabledError, "hixl can't be imported.*install CANN"),
    ],
)
def test_a_wish_that_can_not_be_met(wanted, kind, text):
    with pytest.raises(kind, match=text):
        open_transports(config(transport=wanted), CPU)


@pytest.mark.usefixtures("example")
def test_one_of_others_is_used_where_nothing_is_better():
    classes, broken = known_transports()
    assert (set(classes), broken) == ({"local", "hixl", "nixl", "procmem"}, {})
    assert [name for name in open_transports(config(), CPU).names if name != "nixl"] == [
        "local",
        "procmem",
    ]
    assert open_transports(config(transport="procmem"), CPU).names == ["procmem"]


@pytest.mark.usefixtures("example")
def test_reasons_for_doctor():
    reasons = why_unavailable(CPU)
    assert list(reasons) == ["local", "hixl", "nixl", "procmem"]
    assert reasons["local"] == reasons["procmem"] == ""
    assert "install CANN" in reasons["hixl"]


@pytest.mark.parametrize(
    ("entry", "code", "reason"),
    [
        ("other = other_transport:No", "", "has no attribute 'No'"),
        ("other = other_transport:T", "import not_there", "not_there"),
        ("other = other_transport:T", "T = 5", "no complete subclass of Transport"),
        (
            "other = other_transport:Transport",
            "from llm_datadist_torch.transports.base import Transport",
            "no complete subclass of Transport",
        ),
        (
            "local = other_transport:LocalTransport",
            "from llm_datadist_torch.transports.local import LocalTransport",
            "there is a transport of this name already",
        ),
        (
            "other = other_transport:LocalTransport",
            "from llm_datadist_torch.transports.local import LocalTransport",
            "calls itself 'local'",
        ),
    ],
)
def test_a_broken_one_of_others_is_left_out(tmp_path, monkeypatch, entry, code, reason):
    install(tmp_path, entry, code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_transport", raising=False)
    opened = open_transports(config(), CPU)
    name = entry.partition(" ")[0]
    assert opened.names in (["local"], ["local", "nixl"])
    assert reason in opened.unavailable[name]
    if name != "local":
        with pytest.raises(LLMFeatureNotEnabledError, match=re.escape(reason)):
            open_transports(config(transport=name), CPU)


def test_one_that_does_not_start(tmp_path, monkeypatch, caplog):
    code = """
from llm_datadist_torch import LLMException
from llm_datadist_torch.transports.local import LocalTransport
class T(LocalTransport):
    name = "other"
    def __init__(self, config, device):
        raise LLMException("no card")
"""
    install(tmp_path, "other = other_transport:T", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_transport", raising=False)
    assert open_transports(config(), CPU).unavailable["other"] == "it does not start: no card"
    assert "transport other is not used, it does not start: no card" in caplog.text
    with pytest.raises(RuntimeError, match="no card"):
        open_transports(config(transport="other"), CPU)


def test_the_docs_show_the_example_as_it_is():
    docs = (EXAMPLE.parents[2] / "docs" / "adding_a_transport.md").read_text()
    assert (EXAMPLE / "procmem_transport.py").read_text() in docs


# -- on links -------------------------------------------------------------------------------------


def link(here, there):
    return here.link_clusters([cluster(there.cluster_id, there.listen_address[1])])[0].name


def test_links_say_what_they_use(instance_factory: InstanceFactory, caplog):
    caplog.set_level(logging.INFO, "llm_datadist_torch")
    here, there = instance_factory(), instance_factory()
    assert here.links() == []
    assert link(here, there) == "LLM_SUCCESS"
    (info,) = here.links()
    assert (info.peer, info.state, info.dialed, info.reason) == (
        there.cluster_id,
        "linked",
        True,
        "",
    )
    assert info.transport("host") == "local"
    assert str(info.choices[0]) == "host memory by local (same process)"
    assert f"linked with cluster {there.cluster_id}: host memory by local (same" in caplog.text
    assert not there.links()[0].dialed
    there.finalize()
    assert eventually(lambda: here.links() == [] or here.links()[0].state == "lost")


@pytest.mark.usefixtures("example")
def test_ends_without_a_common_transport(instance_factory: InstanceFactory, caplog):
    here = instance_factory(**{"llm.Transport": "procmem"})
    there = instance_factory(**{"llm.Transport": "local"})
    assert link(here, there) == "LLM_LINK_FAILED"
    assert "one has ['local'], the other ['procmem']" in caplog.text
    assert here.links() == there.links() == []
    assert link(here, instance_factory()) == "LLM_SUCCESS"


@pytest.mark.usefixtures("example")
def test_bytes_through_one_of_others(here: Service, peers: Callable[[], Peer]):
    far, options = peers(), {"llm.Transport": "procmem"}
    far.call("see", str(EXAMPLE))
    port = far.call("start", 2)
    far.call("allocate", "cache", 2, 4, 1000, paged=True, keys=BlocksCacheKey(2, 0))
    here.start(1, options=options)
    here.allocate("cache", 2, 4, 1000, paged=True)
    assert here.link(2, port) == OK
    assert here.transports(2) == far.call("transports", 1) == ("procmem", None)
    key, cache = BlocksCacheKey(2, 0), Ref("cache")

    far.call("paint", "cache", 7)
    here.paint("cache", 1)
    assert here.attempt("pull_blocks", key, cache, [0, 1], [3, 1]) is None
    blocks = [tensor[:, 0].tolist() for tensor in here.held["cache"].cache.tensors]
    assert blocks == [[1, 7, 1, 7]] * 2
    here.paint("cache", 9)
    assert here.attempt("push_blocks", key, cache, [0], [2]) is None
    assert far.call("colours", "cache") == [7, 9]

    far.kill()
    assert eventually(lambda: here.link_states() == {2: "lost"})

# SPDX-License-Identifier: Apache-2.0
"""``open``: its options, where they come from, and what is wrong with them."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch.values import open_options as options
from tests.front_door.conftest import OpenNode
from tests.peers import eventually
from tests.transfer.helpers import free_port

SECRET = "a secret of enough characters"


def test_without_options(open_node: OpenNode):
    node, other = open_node(), open_node()
    assert node.cluster_id != other.cluster_id
    assert node.address is None
    assert not node.closed
    node.close()
    assert node.closed
    node.close()
    assert "closed" in repr(node)
    with pytest.raises(RuntimeError):
        node.allocate(layers=1, blocks=1, shape=(1,))


def test_the_signature_shows_all_options():
    parameters = inspect.signature(ld.open).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"cluster_id", "listen", "timeout_s", "config"} <= {each.name for each in parameters}
    for parameter in parameters:
        assert f"{parameter.name}:" in inspect.getdoc(ld.open)


def test_open_is_listed_but_does_not_hide_pythons_own():
    assert "open" in dir(ld)
    code = "from llm_datadist_torch import *; import builtins; assert open is builtins.open"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"lisen": "127.0.0.1:0"}, ld.LLMParamError, "did you mean listen"),
        ({"clusterid": 1}, ld.LLMParamError, "did you mean cluster_id"),
        ({"zzz": 1}, ld.LLMParamError, "the options are auto_relink"),
        ({"config": {"time_out": 1}}, ld.LLMParamError, "config has no option 'time_out'"),
        ({"config": {"config": {}}}, ld.LLMParamError, "no option 'config'"),
        ({"config": 7}, TypeError, "config"),
        ({"config": "/nowhere/options.toml"}, ld.LLMParamError, "can't be read"),
        ({"cluster_id": "1"}, TypeError, "cluster_id"),
        ({"cluster_id": 2**64}, ValueError, "cluster_id"),
        ({"listen": 1}, TypeError, "listen"),
        ({"listen": "127.0.0.1"}, ld.LLMParamError, "listen"),
        ({"listen": "127.0.0.1:66000"}, ld.LLMParamError, "66000"),
        ({"listen": "no-such-host.invalid:1"}, ld.LLMLinkError, "no-such-host.invalid"),
        ({"role": "prefil"}, ld.LLMParamError, "did you mean 'prefill'"),
        ({"device": "gpu"}, ld.LLMParamError, "gpu"),
        ({"timeout_s": 0}, ld.LLMParamError, "timeout_s=0"),
        ({"timeout_s": float("nan")}, ld.LLMParamError, "nan"),
        ({"timeout_s": 1e10}, ld.LLMParamError, "seconds"),
        ({"timeout_s": "1"}, TypeError, "timeout_s"),
        ({"timeout_s": None}, TypeError, "timeout_s"),
        ({"pool_bytes": 1}, ld.LLMParamError, "pool_bytes=1"),
        ({"pool_bytes": 1.5}, TypeError, "pool_bytes"),
        ({"link_secret": "short"}, ld.LLMParamError, "link_secret"),
        ({"transport": "pigeon"}, ld.LLMException, "pigeon"),
        ({"remote_accessible": 1}, TypeError, "bool"),
        ({"orphan_policy": "eat"}, ld.LLMParamError, "eat"),
        ({"replace": 1}, TypeError, "replace"),
    ],
)
def test_wrong_options(given, error, text):
    with pytest.raises(error, match=text):
        ld.open(**given)


def test_positional_arguments():
    with pytest.raises(TypeError, match="keywords only"):
        ld.open(1)  # type: ignore[misc]


def test_keywords_before_config_before_environment(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (("CLUSTER_ID", "3"), ("LISTEN", "127.0.0.1:0"), ("ROLE", "decode")):
        monkeypatch.setenv(f"LLM_DATADIST_{name}", text)
    node = open_node()
    assert node.cluster_id == 3
    assert node.address.startswith("127.0.0.1:")
    assert open_node(config={"cluster_id": 4}).cluster_id == 4
    assert open_node(config={"cluster_id": 4}, cluster_id=5).cluster_id == 5


@pytest.mark.parametrize("table", ["", "[other]\nx = 1\n[llm_datadist]\n"])
def test_a_toml_file(table: str, open_node: OpenNode, tmp_path: Path):
    pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    path = tmp_path / "options.toml"
    path.write_text(f'{table}cluster_id = 9\nlisten = "127.0.0.1:0"\npool_bytes = 1048576\n')
    for config in (path, str(path)):
        node = open_node(config=config)
        assert node.cluster_id == 9
        with pytest.raises(ld.LLMOutOfMemoryError):
            node.allocate(layers=1, blocks=1, shape=(1 << 20,), dtype=torch.uint8)
        node.close()
    path.write_text(f"{table}cluster_ids = 9\n")
    with pytest.raises(ld.LLMParamError, match="did you mean cluster_id"):
        ld.open(config=path)
    path.write_text("cluster_id = ")
    with pytest.raises(ld.LLMParamError, match="can't be read"):
        ld.open(config=path)


def test_without_a_reader_of_toml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(options.importlib, "import_module", missing)
    with pytest.raises(ld.LLMFeatureNotEnabledError, match="tomli"):
        ld.open(config=tmp_path / "options.toml")


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("CLUSTERID", "1", "did you mean LLM_DATADIST_CLUSTER_ID"),
        ("CLUSTER_ID", "one", "LLM_DATADIST_CLUSTER_ID='one'"),
        ("REMOTE_ACCESSIBLE", "perhaps", "neither true nor false"),
        ("LINK_SECRET", SECRET, "LLM_DATADIST_LINK_SECRET_FILE"),
    ],
)
def test_wrong_variables(variable, text, says, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(f"LLM_DATADIST_{variable}", text)
    with pytest.raises(ld.LLMParamError, match=says) as caught:
        ld.open()
    assert SECRET not in str(caught.value)


def test_variables_of_others(open_node: OpenNode, monkeypatch: pytest.MonkeyPatch):
    # What Kubernetes sets for a service called llm-datadist.
    monkeypatch.setenv("LLM_DATADIST_PORT", "tcp://10.0.0.1:26000")
    monkeypatch.setenv("LLM_DATADIST_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("LLM_DATADIST_RENDEZVOUS", "10.0.0.1:1")
    assert open_node().address is None


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ('listen=":0"', True),
        ('listen="0.0.0.0:0"', True),
        (f'listen=":0", link_secret="{SECRET}"', False),
        ('listen="127.0.0.1:0"', False),
    ],
)
def test_all_interfaces_without_a_secret_are_warned_of(options: str, warned: bool):
    # In a process of its own, because it is said once.
    code = f"import llm_datadist_torch as ld; ld.open({options}).close()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ("link_secret" in done.stderr) == warned


def test_a_name_to_listen_at(open_node: OpenNode):
    assert open_node(listen="localhost:0").address.rpartition(":")[0] in ("127.0.0.1", "[::1]")


@pytest.mark.needs_ipv6
def test_ipv6(open_node: OpenNode):
    listener = open_node(cluster_id=1, listen="[::1]:0")
    assert listener.address.startswith("[::1]:")
    assert open_node().connect(listener.address).cluster_id == 1


def test_a_taken_port_says_what_to_do(open_node: OpenNode):
    port = free_port()
    first = open_node(cluster_id=1, listen=f"127.0.0.1:{port}")
    with pytest.raises(ld.LLMException, match="replace=True") as caught:
        ld.open(cluster_id=1, listen=f"127.0.0.1:{port}")
    assert repr(first) in str(caught.value)
    second = open_node(cluster_id=1, listen=f"127.0.0.1:{port}", replace=True)
    assert first.closed
    assert not second.closed


def test_replace_is_by_cluster_id_too(open_node: OpenNode):
    first, other = open_node(cluster_id=1), open_node(cluster_id=2)
    open_node(cluster_id=1, replace=True)
    assert first.closed
    assert not other.closed


def test_a_dropped_node_closes_itself():
    node = ld.open(cluster_id=1, listen="127.0.0.1:0")
    datadist = node.datadist
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del node
        gc.collect()
    (warning,) = [each for each in caught if each.category is ResourceWarning]
    assert "Node(cluster_id=1, listening at" in str(warning.message)
    assert eventually(lambda: not datadist.initialised)


def test_a_node_around_an_instance_does_not_end_it(instance_factory):
    datadist = instance_factory(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node = ld.Node(datadist)
        assert node.cluster_id == 3
        del node
        gc.collect()
    assert datadist.initialised


def test_a_node_that_is_open_at_exit_says_nothing():
    code = """
        import llm_datadist_torch as ld
        node = ld.open(listen="127.0.0.1:0")
        kv = node.allocate(layers=1, blocks=1, shape=(1,), name="kv")
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

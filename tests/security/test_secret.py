# SPDX-License-Identifier: Apache-2.0
"""Where the link secret comes from, and that it is shown nowhere."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest

from llm_datadist_torch import LLMConfig, LLMDataDist, LLMRole
from llm_datadist_torch.net import addresses
from llm_datadist_torch.net.tls import LinkKeys
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.secret import SECRET_FILE_VARIABLE
from llm_datadist_torch.values.status import LLMFeatureNotEnabledError, LLMParamError
from tests.conftest import make_options

SECRET = "correct horse battery staple"
KEY = "llm.LinkSecret"


def engine(**options: str) -> EngineConfig:
    return EngineConfig.from_options(LLMRole.MIX, make_options(**options))


def secret_file(tmp_path: Path, data: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_an_attribute_and_an_option() -> None:
    config = LLMConfig()
    assert config.link_secret is None
    assert KEY not in config.generate_options()
    config.link_secret = SECRET
    assert config.generate_options()[KEY] == config.link_secret == SECRET
    assert engine(**{KEY: SECRET}).link_secret == SECRET
    config.link_secret = None
    assert KEY not in config.generate_options()


@pytest.mark.parametrize("bad", ["", "x" * 15, "x" * 4097])
def test_a_secret_of_a_bad_length(bad: str) -> None:
    config = LLMConfig()
    for refuse in (lambda: setattr(config, "link_secret", bad), lambda: engine(**{KEY: bad})):
        with pytest.raises(LLMParamError, match="16 to 4096 are needed") as caught:
            refuse()
        assert "secrets.token_urlsafe" in str(caught.value)
        assert not bad or bad not in str(caught.value)


def test_a_secret_that_is_no_text() -> None:
    with pytest.raises(TypeError, match="must be str, but is bytes") as caught:
        LLMConfig().link_secret = SECRET.encode()  # type: ignore[assignment]
    assert SECRET not in str(caught.value)


def test_it_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = LLMConfig()
    config.link_secret = SECRET
    config.enable_cache_manager = True
    config.listen_ip_info = "127.0.0.1:0"
    options = config.generate_options()
    keys = LinkKeys.from_secret(SECRET)
    shown = [options, config.options, copy.deepcopy(options), pickle.loads(pickle.dumps(options))]
    datadist = LLMDataDist(LLMRole.MIX, 1)
    with datadist:
        datadist.init(options)
        shown += [engine(**options), config, keys, datadist, datadist.links(), vars(datadist)]
    texts = [repr(it) for it in shown] + [str(it) for it in shown] + [caplog.text]
    assert not [text for text in texts if SECRET in text]


@pytest.mark.parametrize("data", [SECRET.encode(), SECRET.encode() + b"\n", b" " + SECRET.encode()])
def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setenv(SECRET_FILE_VARIABLE, secret_file(tmp_path, data, 0o640))
    assert engine().link_secret == SECRET
    assert engine(**{KEY: "y" * 20}).link_secret == "y" * 20


@pytest.mark.parametrize(
    ("data", "mode", "fault"),
    [
        (b"", 0o600, "has 0 characters"),
        (b"short", 0o600, "has 5 characters"),
        (b"x" * 100_000, 0o600, "16 to 4096"),
        (b"\xff" * 32, 0o600, "is no UTF-8 text"),
        (SECRET.encode(), 0o644, r"is open to all users of this host \(mode 0644\)"),
        (SECRET.encode(), 0o602, "is open to all users"),
    ],
)
def test_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, mode: int, fault: str
) -> None:
    monkeypatch.setenv(SECRET_FILE_VARIABLE, secret_file(tmp_path, data, mode))
    with pytest.raises(LLMParamError, match=fault) as caught:
        engine()
    assert SECRET not in str(caught.value)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, fault in (
        ("none", "No such file"),
        ("pipe", "is no regular file"),
        (".", "is no regular file"),
    ):
        monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / name))
        with pytest.raises(LLMParamError, match=fault):
            engine()


def test_keys_come_from_the_secret_alone() -> None:
    first, again, other = (LinkKeys.from_secret(s) for s in (SECRET, SECRET, SECRET + "!"))
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first.listener, first.dialer) == (again.listener, again.dialer)
    assert len({first.listener, first.dialer, other.listener, other.dialer}) == 4
    assert LinkKeys.from_secret(None) is None


def test_without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(LLMFeatureNotEnabledError, match="needs the package cryptography"):
        LLMDataDist(LLMRole.MIX, 1).init(make_options(**{KEY: SECRET}))


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("127.0.0.1", False),
        ("127.3.2.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.1.2.3", True),
    ],
)
def test_networks_are_warned_of_once(
    address: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    addresses._warned.clear()
    addresses.warn_of_network(address)
    addresses.warn_of_network(address)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warned


def test_listening_on_a_network_is_warned_of(
    instance_factory, caplog: pytest.LogCaptureFixture
) -> None:
    addresses._warned.clear()
    instance_factory(listen="0.0.0.0:0", **{KEY: SECRET})
    assert "neither authenticated" not in caplog.text
    instance_factory(listen="127.0.0.1:0")
    assert "neither authenticated" not in caplog.text
    for _ in range(2):
        instance_factory(listen="0.0.0.0:0")
    assert caplog.text.count("neither authenticated nor encrypted") == 1
    assert "link_secret" in caplog.text

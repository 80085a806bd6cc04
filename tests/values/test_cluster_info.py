# SPDX-License-Identifier: Apache-2.0
"""LLMClusterInfo: addresses in, entries out, and back to text."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist_torch.values.cluster_info import LLMClusterInfo, entry_to_host, trans_str_ip
from llm_datadist_torch.values.enums import LLMRole
from llm_datadist_torch.values.status import LLMException, LLMParamError, LLMStatusCode

SIDES = ["local", "remote"]


def append(info, side, ip, port):
    getattr(info, f"append_{side}_ip_info")(ip, port)


def entries(info, side):
    return getattr(info, f"{side}_ip_info_list")


def test_a_fresh_one_is_empty():
    info = LLMClusterInfo()
    assert info.remote_cluster_id is None
    assert info.remote_role_type is None
    assert info.local_ip_info_list == []
    assert info.remote_ip_info_list == []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("ip", "entry", "host"),
    [
        ("1.2.3.4", 67305985, "1.2.3.4"),
        ("127.0.0.1", 16777343, "127.0.0.1"),
        ("127.1", 16777343, "127.0.0.1"),
        ("0x7f.1", 16777343, "127.0.0.1"),
        ("255.255.255.255", 2**32 - 1, "255.255.255.255"),
        (0, 0, "0.0.0.0"),
        (16777343, 16777343, "127.0.0.1"),
        (2**32 - 1, 2**32 - 1, "255.255.255.255"),
        ("::1", "::1", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1%eth0"),
        ("::ffff:1.2.3.4", "::ffff:1.2.3.4", "::ffff:1.2.3.4"),
    ],
)
def test_addresses(side, ip, entry, host):
    info = LLMClusterInfo()
    live = entries(info, side)
    append(info, side, ip, 26000)
    assert live == entries(info, side) == [(entry, 26000)]
    assert entry_to_host(entry) == host
    assert entries(info, SIDES[1 - SIDES.index(side)]) == []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("ip", "port", "expected", "text"),
    [
        (None, 1, TypeError, "ip only support"),
        (1.0, 1, TypeError, "ip only support"),
        (b"1.2.3.4", 1, TypeError, "ip only support"),
        (None, "1", TypeError, "ip only support"),
        ("bad", "1", TypeError, "port only support"),
        ("bad", None, TypeError, "port only support"),
        ("bad", -1, ValueError, "port=-1"),
        ("bad", 65536, ValueError, "port=65536"),
        (2**32, 65536, ValueError, "port=65536"),
        (2**32, 1, ValueError, "ip=4294967296"),
        (-1, 1, ValueError, "ip=-1"),
        pytest.param(10**5000, 1, ValueError, "ip=", id="long"),
    ],
)
def test_bad_types_and_ranges_in_order(side, ip, port, expected, text):
    info = LLMClusterInfo()
    with pytest.raises(expected, match=text) as caught:
        append(info, side, ip, port)
    assert not isinstance(caught.value, LLMException)
    assert entries(info, side) == []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "ip",
    [
        "",
        "localhost",
        "1.2.3.256",
        "1.2.3.4.5",
        "1.2.3.4 x",
        "1.2.3.4\n",
        "1.2.3.4\0",
        "[::1]",
        "::1::",
        "1.2.3.4:5",
        "{ip}",
        "\udcff",
        "१.१.१.१",
    ],
)
def test_text_that_is_no_address(side, ip):
    info = LLMClusterInfo()
    with pytest.raises(RuntimeError) as caught:
        append(info, side, ip, 1)
    # One exception for the code's type, the documents' type, and ours.
    assert isinstance(caught.value, LLMParamError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert repr(ip) in str(caught.value)
    assert entries(info, side) == []


@given(st.ip_addresses(v=4))
def test_ipv4_round_trip(address):
    entry = trans_str_ip(str(address))
    assert entry == int.from_bytes(address.packed, "little")
    assert ipaddress.IPv4Address(entry_to_host(entry)) == address


@given(st.ip_addresses(v=6))
def test_ipv6_is_kept_as_text(address):
    info = LLMClusterInfo()
    info.append_remote_ip_info(str(address), 0)
    assert info.remote_ip_info_list == [(str(address), 0)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, TypeError), ("1", TypeError), (1.0, TypeError), (-1, ValueError), (2**64, ValueError)],
)
def test_bad_cluster_ids(value, expected):
    info = LLMClusterInfo()
    info.remote_cluster_id = 2**64 - 1
    with pytest.raises(expected, match="remote_cluster_id"):
        info.remote_cluster_id = value
    assert info.remote_cluster_id == 2**64 - 1


def test_role_type():
    info = LLMClusterInfo()
    for value in (LLMRole.MIX, 7, None):
        info.remote_role_type = value
        assert info.remote_role_type == value
    with pytest.raises(TypeError, match="remote_role_type"):
        info.remote_role_type = "MIX"


def test_repr_shows_what_is_in_it():
    info = LLMClusterInfo()
    info.remote_cluster_id = 5
    info.append_remote_ip_info("127.0.0.1", 9)
    assert "remote_cluster_id=5" in repr(info)
    assert "remote_ip_info_list=[(16777343, 9)]" in repr(info)

# SPDX-License-Identifier: Apache-2.0
"""What a peer may say of device memory that it shares; how it is used needs an NPU."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from llm_datadist_torch import _C
from llm_datadist_torch.transports.base import CacheVersion, RegionView
from llm_datadist_torch.transports.local.host import HostIdentity, LocalOffer
from llm_datadist_torch.transports.local.ipc import messages
from llm_datadist_torch.transports.local.mappings import PeerMappings

REGION = RegionView(1, 1 << 40, 4096, 5, 6, 7)
SHARED = messages.SharedMemory(1 << 46, 1 << 30, b"key", CacheVersion(REGION, 16, 1, 0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", -1),
        ("start", 1 << 62),
        ("nbytes", -1),
        ("nbytes", 1 << 63),
        ("key", b""),
        ("key", b"k" * 65),
        ("key", "k" * 8),
        ("closed", None),
    ],
)
def test_lies_are_no_message(name: str, value: Any) -> None:
    honest = messages.Shown([SHARED])
    assert messages.decode(messages.encode(honest), messages.Shown) == honest
    lie = messages.Shown([msgspec.structs.replace(SHARED, **{name: value})])
    with pytest.raises(msgspec.DecodeError):
        messages.decode(messages.encode(lie), messages.Shown)


@pytest.mark.parametrize("offset", [-8, 4, 4096 - 8, 4096, 1 << 40])
def test_counters_are_in_their_region(offset: int) -> None:
    region = _C.HostRegion.create(4096, shareable=True)
    view = RegionView(
        1, region.address, 4096, region.fd, region.inode, region.device, region.offset
    )
    mappings = PeerMappings(HostIdentity.of_this_process(), trusted=True)
    mapping, address = mappings.counters(CacheVersion(view, 16, 0, 0))
    assert address == mapping.address + 16
    with pytest.raises(OSError, match="are not in 4096 bytes"):
        mappings.counters(CacheVersion(view, offset, 0, 0))


def test_an_offer_without_a_word_of_it_is_of_a_peer_that_can_not() -> None:
    plain = msgspec.msgpack.encode(HostIdentity("boot", 1, os.getpid(), 2))
    offer = msgspec.msgpack.decode(plain, type=LocalOffer)
    assert offer.no_ipc == "it does not offer it"
    assert offer.pid == os.getpid()

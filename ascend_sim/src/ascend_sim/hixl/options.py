# SPDX-License-Identifier: Apache-2.0
"""Options and engine names, from their texts."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ascend_sim.hixl import constants

logger = logging.getLogger("hixl")

_KEYS = {value for name, value in vars(constants).items() if name.startswith("OPTION_")}
_UNSIGNED_MAX = {
    constants.OPTION_RDMA_TRAFFIC_CLASS: 255,
    constants.OPTION_RDMA_SERVICE_LEVEL: 7,
}


@dataclass(frozen=True)
class Options:
    """What an engine was told at `initialize`.

    Attributes:
        fabric_mem: whether all pieces of one transfer must be of one kind of memory.
        staging: whether unregistered addresses are taken for host memory.
        auto_connect: whether the first transfer connects, and dead links are dropped.
        new_resources: LocalCommRes of version 1.3: any number of links, and one call for the state
            of all transfers.
    """

    fabric_mem: bool = False
    staging: bool = True
    auto_connect: bool = False
    new_resources: bool = False

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Options:
        """Checks and types the options of `initialize`. Unknown keys are warned of.

        Raises:
            ValueError: an option is wrong.
        """
        for key in texts.keys() - _KEYS:
            logger.warning("option %r is unknown and ignored", key)
        for key, limit in _UNSIGNED_MAX.items():
            text = texts.get(key, "0")
            if not re.fullmatch("[0-9]{1,3}", text) or int(text) > limit:
                raise ValueError(f"{key}={text!r} must be a number in [0, {limit}]")
        _json_object(texts, constants.OPTION_GLOBAL_RESOURCE_CONFIG)
        resources = _json_object(texts, constants.OPTION_LOCAL_COMM_RES)
        return cls(
            fabric_mem=_flag(texts, constants.OPTION_ENABLE_USE_FABRIC_MEM),
            staging=_has_pool(texts.get(constants.OPTION_BUFFER_POOL, "4:8")),
            auto_connect=_flag(texts, constants.OPTION_AUTO_CONNECT),
            new_resources=resources.get("version") == "1.3",
        )


def _flag(texts: Mapping[str, str], key: str) -> bool:
    text = texts.get(key, "0")
    if text not in ("0", "1"):
        raise ValueError(f'{key}={text!r} must be "0" or "1"')
    return text == "1"


def _has_pool(text: str) -> bool:
    match = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", text)
    count, megabytes = (int(number) for number in match.groups()) if match else (0, 1)
    if (count == 0) != (megabytes == 0):
        raise ValueError(
            f"{constants.OPTION_BUFFER_POOL}={text!r} must be COUNT:MEGABYTES, or 0:0 for no pool"
        )
    return count > 0


def _json_object(texts: Mapping[str, str], key: str) -> dict[str, object]:
    text = texts.get(key, "")
    if not text:
        return {}
    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from None
    if not isinstance(members, dict):
        raise ValueError(f"{key} must be a JSON object, but is {text!r}")
    return members


def parse_engine(name: str) -> tuple[str, int]:
    """Splits an engine's name, "ip:port" or "[ipv6]:port".

    Returns:
        The address, and the port, 0 if the name has none.

    Raises:
        ValueError: not of that form.
    """
    match = re.fullmatch(r"(?:\[(?P<v6>[^]]*)\]|(?P<v4>[^:]*))(?::(?P<port>[0-9]{1,5}))?", name)
    if match is None:
        raise ValueError(f'engine {name!r} is not of the form "ip:port" or "[ipv6]:port"')
    if match["v6"] is not None:
        host = str(match["v6"])
        ipaddress.IPv6Address(host)
    else:
        host = str(match["v4"])
        ipaddress.IPv4Address(host)
    port = int(match["port"] or 0)
    if port >= 1 << 16:
        raise ValueError(f"engine {name!r}: port {port} is out of range [0, 65535]")
    return host, port

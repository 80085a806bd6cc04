# SPDX-License-Identifier: Apache-2.0
"""One HIXL engine: started, called in the right context, ended."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing

import torch

from llm_datadist_torch.memory.device_copies import current_device
from llm_datadist_torch.net.addresses import address_towards
from llm_datadist_torch.transports.hixl.ports import (
    AUTO_CONNECT,
    CLIENT_SERVER_COMM,
    Port,
    open_port,
)
from llm_datadist_torch.transports.hixl.statuses import PARAM_INVALID, SUCCESS, hixl_error
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.config import EngineConfig

logger = logging.getLogger("llm_datadist_torch")

_ATTEMPTS = 8
"""Others may take a free port between our look and the engine's start."""
_ANY_ADDRESS = {"", "0.0.0.0", "::"}  # noqa: S104  to replace them
_SOMEWHERE = ("192.0.2.1", 9)
"""An address that is nobody's (RFC 5737): the route to it tells this machine's own address."""
_LOCAL_COMM_RES = "LocalCommRes"
_CLIENT_SERVER = '{"version": "1.3"}'
"""LocalCommRes of the engine without a limit of links, which peers on one device can use."""


class HixlEngine:
    """One HIXL engine, which peers reach at :attr:`address`.

    Thread safety: HIXL's calls may come from any thread that has the engine's device set: inside
    ``with engine.on_device()``.

    Args:
        config: ``listen`` says at which address, the port is any that is free; the options for
            HIXL are passed on.
        device: The device whose memory it moves.

    Raises:
        LLMException: HIXL refused to start, with its reason as far as it gives one.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.port = open_port()
        self._device = device
        host = _address_of(config)
        status = None
        with self.on_device():
            # What this release is said to have may need a newer driver: then without it.
            for options in _options(self.port, config):
                for address in itertools.islice(_free_addresses(host), _ATTEMPTS):
                    status = self.port.initialize(address, options)
                    if status == SUCCESS:
                        self.address = address
                        logger.debug("HIXL engine at %s, %s, %s", address, device, options)
                        return
                    if status == PARAM_INVALID:
                        break
        if status is None:
            raise param_error(f"{host} has no free port for HIXL")
        raise hixl_error(
            status,
            f"start an engine at {host} on {device}",
            remedy="look into CANN's log; check listen_ip_info, local_comm_res and"
            " global_resource_config.",
        )

    def on_device(self) -> AbstractContextManager[None]:
        """The engine's device set in this thread, and what was set before restored afterwards."""
        return current_device(self._device)

    def finalize(self) -> None:
        """End the engine; idempotent. Nothing moves any more when it returns."""
        with self.on_device():
            self.port.finalize()


def _address_of(config: EngineConfig) -> str:
    """Where the engine listens: as the instance, or at the address that its machine goes out by."""
    host = "" if config.listen is None else config.listen[0]
    if host not in _ANY_ADDRESS:
        return host
    try:
        return address_towards(*_SOMEWHERE)
    except OSError:
        return "127.0.0.1"


def _options(port: Port, config: EngineConfig) -> list[dict[str, str]]:
    """What to try to start the engine with, the best first; what an administrator set stays."""
    given = {
        _LOCAL_COMM_RES: config.local_comm_res,
        "GlobalResourceConfig": config.global_resource_config,
        "RdmaTrafficClass": config.rdma_traffic_class,
        "RdmaServiceLevel": config.rdma_service_level,
        # No staging pool: everything is registered, and with one an address that isn't would be
        # taken for host memory instead of being refused.
        "BufferPool": "0:0",
    }
    plain = {key: str(value) for key, value in given.items() if value is not None}
    better = plain.copy()
    if port.supports(CLIENT_SERVER_COMM):
        better.setdefault(_LOCAL_COMM_RES, _CLIENT_SERVER)
    if port.supports(AUTO_CONNECT):
        better.setdefault("AutoConnect", "1")
    return [better] if better == plain else [better, plain]


def _free_addresses(host: str) -> Iterator[str]:
    """Addresses where the engine may listen, the port any that the system has.

    Not one near the instance's: somebody may be told to listen there. Port 0 would make the engine
    a client only, so ports are looked for here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        with closing(socket.socket(family)) as probe:
            try:
                probe.bind((host, 0))
            except OSError:
                return
            free = probe.getsockname()[1]
        yield f"[{host}]:{free}" if family == socket.AF_INET6 else f"{host}:{free}"

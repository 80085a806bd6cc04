# SPDX-License-Identifier: Apache-2.0
"""One HIXL engine: started, called in the right context, ended."""

from __future__ import annotations

import importlib
import itertools
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import torch

from llm_datadist_torch.config import EngineConfig
from llm_datadist_torch.transports.hixl.statuses import SUCCESS, hixl_error
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

_NEAR_PORTS = 64
"""Ports after the instance's own that the engine tries before it takes any."""
_ATTEMPTS = 8
"""Others may take a free port between our look and the engine's start."""


def import_hixl() -> Any:  # noqa: ANN401  CANN's module has no type information
    """CANN's module ``hixl``, imported when first needed.

    Raises:
        ImportError: It isn't there, or what it needs isn't.
    """
    return importlib.import_module("hixl")


class HixlEngine:
    """One HIXL engine, which peers reach at :attr:`address`.

    Thread safety: HIXL's calls may come from any thread that has the engine's device set: inside
    ``with engine.on_device()``.

    Args:
        config: ``listen`` says where; the options for HIXL are passed on.
        device: The device whose memory it moves.

    Raises:
        LLMException: HIXL refused to start, with its reason as far as it gives one.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self.module = import_hixl()
        self._device = device
        self._device_module = torch.get_device_module(device)
        self.hixl = self.module.Hixl()
        if config.listen is None:
            raise param_error("HIXL needs listen_ip_info")
        host, port = config.listen
        failure: LLMException | None = None
        with self.on_device():
            for address in itertools.islice(_free_addresses(host, port), _ATTEMPTS):
                status = self.hixl.initialize(address, _options(self.module, config))
                if status == SUCCESS:
                    self.address = address
                    logger.debug("HIXL engine at %s, %s", address, device)
                    return
                failure = hixl_error(
                    status,
                    f"start an engine at {address} on {device}",
                    remedy="look into CANN's log; check listen_ip_info, local_comm_res and"
                    " global_resource_config.",
                )
        raise failure or param_error(f"{host} has no free port for HIXL")

    def on_device(self) -> AbstractContextManager[object]:
        """The engine's device set in this thread, and what was set before restored afterwards."""
        scope: AbstractContextManager[object] = self._device_module.device(self._device)
        return scope

    def finalize(self) -> None:
        """End the engine; idempotent. Nothing moves any more when it returns."""
        with self.on_device():
            self.hixl.finalize()


def _options(module: Any, config: EngineConfig) -> dict[str, str]:  # noqa: ANN401  see import_hixl
    given = {
        module.OPTION_LOCAL_COMM_RES: config.local_comm_res,
        module.OPTION_GLOBAL_RESOURCE_CONFIG: config.global_resource_config,
        module.OPTION_RDMA_TRAFFIC_CLASS: config.rdma_traffic_class,
        module.OPTION_RDMA_SERVICE_LEVEL: config.rdma_service_level,
        # No staging pool: everything is registered, and with one an address that isn't would be
        # taken for host memory instead of being refused.
        module.OPTION_BUFFER_POOL: "0:0",
    }
    return {key: str(value) for key, value in given.items() if value is not None}


def _free_addresses(host: str, port: int) -> Iterator[str]:
    """Addresses where the engine may listen: near the instance's port, then anywhere.

    Port 0 would make the engine a client only, so ports are looked for here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    near = range(port + 1, min(port + 1 + _NEAR_PORTS, 1 << 16)) if port else range(0)
    for wanted in itertools.chain(near, itertools.repeat(0, _ATTEMPTS)):
        with closing(socket.socket(family)) as probe:
            try:
                probe.bind((host, wanted))
            except OSError:
                continue
            free = probe.getsockname()[1]
        yield f"[{host}]:{free}" if family == socket.AF_INET6 else f"{host}:{free}"

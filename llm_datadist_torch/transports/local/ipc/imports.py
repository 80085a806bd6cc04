# SPDX-License-Identifier: Apache-2.0
"""Device memory of other processes that is open in this one: once per key, whoever uses it."""

from __future__ import annotations

import threading

import torch

from llm_datadist_torch.memory import device_copies
from llm_datadist_torch.transports.local.ipc.runtime import ipc_runtime


class Imports:
    """Opens each key once: a process may not import one twice, and may have several links.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[int, int]] = {}  # key -> address, users

    def open(self, key: bytes, device: torch.device) -> int:
        """Its address here; to be closed as often as it was opened.

        Raises:
            LLMDeviceError: The runtime refuses.
        """
        with self._lock:
            address, users = self._open.get(key, (0, 0))
            if not users:
                with device_copies.current_device(device):
                    address = ipc_runtime().open(key)
            self._open[key] = (address, users + 1)
            return address

    def close(self, key: bytes, device: torch.device) -> None:
        """End one :meth:`open`.

        Raises:
            LLMDeviceError: The runtime refuses; the memory counts as closed.
        """
        with self._lock:
            address, users = self._open.pop(key)
            if users > 1:
                self._open[key] = (address, users - 1)
                return
            with device_copies.current_device(device):
                ipc_runtime().close(key)


IMPORTS = Imports()
"""Those of this process."""

# SPDX-License-Identifier: Apache-2.0
"""The two ways to call HIXL: the C++ class of libcann_hixl.so, and CANN's Python module ``hixl``.

The library is in every CANN from 8.5 on, the module only in few.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from llm_datadist_torch.transports.base import Direction, MemoryKind, Movement
from llm_datadist_torch.transports.hixl.native import NativeLibrary

AUTO_CONNECT, CLIENT_SERVER_COMM = "AUTO_CONNECT", "CLIENT_SERVER_COMM"
"""Features that a release of HIXL may have."""

WAITING, COMPLETED = 0, 1
"""States of a transfer; any other is a failure."""

_OPERATIONS = {Direction.READ: 0, Direction.WRITE: 1}
_KINDS = {MemoryKind.DEVICE: 0, MemoryKind.HOST: 1}
_FEATURES = {AUTO_CONNECT: 0, CLIENT_SERVER_COMM: 1}


class Port(ABC):
    """One engine of HIXL. Statuses are HIXL's; nothing raises.

    Calls belong to threads that have the engine's device set.
    """

    chunk: ClassVar[int]
    """Descriptors of one transfer at most."""

    @abstractmethod
    def supports(self, feature: str) -> bool:
        """Whether this release has `AUTO_CONNECT`, or `CLIENT_SERVER_COMM`."""

    @abstractmethod
    def initialize(self, address: str, options: Mapping[str, str]) -> int:
        """Start the engine at "ip:port"."""

    @abstractmethod
    def finalize(self) -> None:
        """End it; may be repeated."""

    @abstractmethod
    def register(self, address: int, nbytes: int, kind: MemoryKind) -> tuple[int, Any]:
        """Make memory known; returns a status and a handle."""

    @abstractmethod
    def deregister(self, handle: Any) -> int:  # noqa: ANN401  HIXL's name for it
        """Forget it."""

    @abstractmethod
    def connect(self, remote: str, timeout_ms: int) -> int:
        """Connect to another engine."""

    @abstractmethod
    def disconnect(self, remote: str, timeout_ms: int) -> int:
        """End a connection and its transfers."""

    @abstractmethod
    def transfer(self, remote: str, movement: Movement, first: int, count: int) -> tuple[int, Any]:
        """Begin to move some of a movement's runs: `count` from number `first` on.

        Run r of tensor t has the number t * len(runs) + r. Returns a status and a request.
        """

    @abstractmethod
    def transfer_state(self, request: Any) -> tuple[int, int]:  # noqa: ANN401  HIXL's name
        """How far a request is; one that is not `WAITING` is freed and must not be asked again."""


class NativePort(Port):
    """Through our library, which makes the descriptors in C++."""

    chunk = 1 << 14

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._engine = library.new_engine()

    def supports(self, feature: str) -> bool:
        """See `Port.supports`."""
        return self._library.supports(_FEATURES[feature])

    def initialize(self, address: str, options: Mapping[str, str]) -> int:
        """See `Port.initialize`."""
        return self._engine.initialize(address, options)

    def finalize(self) -> None:
        """See `Port.finalize`."""
        self._engine.finalize()

    def register(self, address: int, nbytes: int, kind: MemoryKind) -> tuple[int, Any]:
        """See `Port.register`."""
        return self._engine.register(address, nbytes, _KINDS[kind])

    def deregister(self, handle: Any) -> int:  # noqa: ANN401
        """See `Port.deregister`."""
        return self._engine.deregister(handle)

    def connect(self, remote: str, timeout_ms: int) -> int:
        """See `Port.connect`."""
        return self._engine.connect(remote, timeout_ms)

    def disconnect(self, remote: str, timeout_ms: int) -> int:
        """See `Port.disconnect`."""
        return self._engine.disconnect(remote, timeout_ms)

    def transfer(self, remote: str, movement: Movement, first: int, count: int) -> tuple[int, Any]:
        """See `Port.transfer`."""
        tables = (movement.local_addrs, movement.remote_addrs, movement.runs)
        operation = _OPERATIONS[movement.direction]
        return self._engine.transfer(remote, operation, tables, first, count)

    def transfer_state(self, request: Any) -> tuple[int, int]:  # noqa: ANN401
        """See `Port.transfer_state`."""
        return self._engine.transfer_state(request)


class ModulePort(Port):
    """Through CANN's Python module, an object per descriptor.

    Args:
        module: The module ``hixl``.
    """

    chunk = 2048  # so many objects take about a millisecond, in which HIXL works on those before

    def __init__(self, module: Any) -> None:  # noqa: ANN401  it has no type information
        self._module = module
        self._hixl = module.Hixl()
        self._operations = {
            Direction.READ: module.TransferOp.READ,
            Direction.WRITE: module.TransferOp.WRITE,
        }
        self._kinds = {
            MemoryKind.DEVICE: module.MemType.MEM_DEVICE,
            MemoryKind.HOST: module.MemType.MEM_HOST,
        }

    def supports(self, feature: str) -> bool:
        """See `Port.supports`."""
        module = self._module
        status, found = module.get_capability(getattr(module.FeatureType, feature))
        return bool(status == module.SUCCESS and found == module.FEATURE_SUPPORTED)

    def initialize(self, address: str, options: Mapping[str, str]) -> int:
        """See `Port.initialize`."""
        return int(self._hixl.initialize(address, dict(options)))

    def finalize(self) -> None:
        """See `Port.finalize`."""
        self._hixl.finalize()

    def register(self, address: int, nbytes: int, kind: MemoryKind) -> tuple[int, Any]:
        """See `Port.register`."""
        description = self._module.MemDesc(address, nbytes)
        status, handle = self._hixl.register_mem(description, self._kinds[kind])
        return int(status), handle

    def deregister(self, handle: Any) -> int:  # noqa: ANN401
        """See `Port.deregister`."""
        return int(self._hixl.deregister_mem(handle))

    def connect(self, remote: str, timeout_ms: int) -> int:
        """See `Port.connect`."""
        return int(self._hixl.connect(remote, timeout_ms))

    def disconnect(self, remote: str, timeout_ms: int) -> int:
        """See `Port.disconnect`."""
        return int(self._hixl.disconnect(remote, timeout_ms))

    def transfer(self, remote: str, movement: Movement, first: int, count: int) -> tuple[int, Any]:
        """See `Port.transfer`."""
        columns = (column[first : first + count].tolist() for column in movement.expanded())
        descriptors = list(map(self._module.TransferOpDesc, *columns))
        operation = self._operations[movement.direction]
        status, request = self._hixl.transfer_async(remote, operation, descriptors)
        return int(status), request

    def transfer_state(self, request: Any) -> tuple[int, int]:  # noqa: ANN401
        """See `Port.transfer_state`."""
        status, state = self._hixl.get_transfer_status(request)
        return int(status), WAITING if status else int(state)


def open_port() -> Port:
    """A new engine, through the library if it is there, else through the module.

    Raises:
        ImportError: Neither is there; the message says why.
    """
    try:
        return NativePort(NativeLibrary.load())
    except OSError as error:
        return ModulePort(_import_module(error))


def describe() -> str:
    """Which of the two is used here, and why not the other.

    Raises:
        ImportError: Neither is there; the message says why.
    """
    try:
        return f"the class hixl::Hixl of {NativeLibrary.load().describe()}"
    except OSError as error:
        module = _import_module(error)
        where = getattr(module, "__file__", None) or "sys.modules"
        return f"the Python module hixl of {where}, because {error}"


def _import_module(why_not_the_library: OSError) -> Any:  # noqa: ANN401  it has no type information
    try:
        return importlib.import_module("hixl")
    except ImportError as error:
        raise ImportError(
            f"{why_not_the_library}; and the Python module hixl can't be imported ({error})"
        ) from error

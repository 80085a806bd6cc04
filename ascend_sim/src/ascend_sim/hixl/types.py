# SPDX-License-Identifier: Apache-2.0
"""Enums and value objects of the module ``hixl``. Like the real ones they refuse wrong types."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import ClassVar, TypeVar

T = TypeVar("T")

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1


class _Names(Enum):
    def __int__(self) -> int:
        number: int = self.value
        return number


class MemType(_Names):
    """Where memory is."""

    MEM_DEVICE = 0
    MEM_HOST = 1


class TransferOp(_Names):
    """READ is from the remote to the local side."""

    READ = 0
    WRITE = 1


class TransferStatus(_Names):
    """What has become of an asynchronous transfer. TIMEOUT is never used."""

    WAITING = 0
    COMPLETED = 1
    TIMEOUT = 2
    FAILED = 3


class AsyncConnectStatus(_Names):
    """How far an asynchronous connect or disconnect is."""

    NOT_CONNECT = 0
    CONNECT_PENDING = 1
    CONNECTING = 2
    CONNECTED = 3
    CONNECT_FAILED = 4
    DISCONNECT_PENDING = 5
    DISCONNECTING = 6


class FeatureType(_Names):
    """What `get_capability` can be asked for."""

    AUTO_CONNECT = 0
    CLIENT_SERVER_COMM = 1


def expect(name: str, value: object, kind: type[T]) -> T:
    """The value, if it is of that type.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, but is {type(value).__name__}: {value!r}")
    return value


def integer(name: str, value: object, low: int, high: int) -> int:
    """The value, if it is an int that the C++ type holds.

    Raises:
        TypeError: it is not.
    """
    number = expect(name, value, int)
    if not low <= number <= high:
        raise TypeError(f"{name} must be in [{low}, {high}], but is {number}")
    return number


def milliseconds(value: object) -> int:
    """A time limit, if it is an int32.

    Raises:
        TypeError: it is not.
    """
    return integer("timeout_in_millis", value, -INT32_MAX - 1, INT32_MAX)


def _uint64(name: str, value: object) -> int:
    return integer(name, value, 0, UINT64_MAX)


def _uint32(name: str, value: object) -> int:
    return integer(name, value, 0, UINT32_MAX)


def _text(name: str, value: object) -> str:
    return expect(name, value, str)


def _flag(name: str, value: object) -> bool:
    return expect(name, value, bool)


def _status(name: str, value: object) -> TransferStatus:
    return expect(name, value, TransferStatus)


class _Struct:
    """An object with fixed attributes of fixed types, which may be set."""

    _checks: ClassVar[dict[str, Callable[[str, object], object]]] = {}

    def __setattr__(self, name: str, value: object) -> None:
        check = self._checks.get(name)
        if check is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, check(name, value))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._checks)
        return f"{type(self).__name__}({values})"


class MemDesc(_Struct):
    """A range of memory."""

    _checks: ClassVar = {"addr": _uint64, "len": _uint64}
    addr: int
    len: int

    def __init__(self, addr: int, len: int) -> None:  # noqa: A002 - the real name
        self.addr = addr
        self.len = len


class TransferOpDesc(_Struct):
    """One piece of a transfer."""

    _checks: ClassVar = {"local_addr": _uint64, "remote_addr": _uint64, "len": _uint64}
    local_addr: int
    remote_addr: int
    len: int

    def __init__(self, local_addr: int, remote_addr: int, len: int) -> None:  # noqa: A002 - as above
        self.local_addr = local_addr
        self.remote_addr = remote_addr
        self.len = len


class NotifyDesc(_Struct):
    """A message to the peer's program."""

    _checks: ClassVar = {"name": _text, "notify_msg": _text}
    name: str
    notify_msg: str

    def __init__(self, name: str, notify_msg: str) -> None:
        self.name = name
        self.notify_msg = notify_msg


class TransferArgs(_Struct):
    """What an asynchronous transfer gives back with its result."""

    _checks: ClassVar = {"user_data": _uint64}
    user_data: int

    def __init__(self) -> None:
        self.user_data = 0


class GetTransferStatusArgs(_Struct):
    """Which transfers `get_all_transfer_status` tells of."""

    _checks: ClassVar = {"max_query_count": _uint32, "skip_waiting": _flag}
    max_query_count: int
    skip_waiting: bool

    def __init__(self, max_query_count: int = UINT32_MAX, skip_waiting: bool = False) -> None:
        self.max_query_count = max_query_count
        self.skip_waiting = skip_waiting


class TransferResult(_Struct):
    """One transfer's state."""

    _checks: ClassVar = {"req": _uint64, "user_data": _uint64, "status": _status}
    req: int
    user_data: int
    status: TransferStatus

    def __init__(self, req: int, user_data: int, status: TransferStatus) -> None:
        self.req = req
        self.user_data = user_data
        self.status = status

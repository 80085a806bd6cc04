# SPDX-License-Identifier: Apache-2.0
"""`Hixl`, the engine itself. Nothing raises but a TypeError for an argument of a wrong type."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from ascend_sim.hixl import library
from ascend_sim.hixl.constants import FEATURE_SUPPORTED, SUCCESS
from ascend_sim.hixl.types import (
    UINT64_MAX,
    AsyncConnectStatus,
    FeatureType,
    GetTransferStatusArgs,
    MemDesc,
    MemType,
    NotifyDesc,
    TransferArgs,
    TransferOp,
    TransferOpDesc,
    TransferResult,
    TransferStatus,
    expect,
    integer,
    milliseconds,
)

_REPORT = struct.Struct("=QQQ")


def get_capability(feature: FeatureType, /) -> tuple[int, int]:
    """Whether a feature is there: both are."""
    expect("feature", feature, FeatureType)
    return SUCCESS, FEATURE_SUPPORTED


class Hixl:
    """One engine: it reads and writes the registered memory of others, and they read and write its.

    Calls belong to the thread that initialised it, or to threads with the same AscendCL context.
    """

    def __init__(self) -> None:
        self._engine = library.new_engine()

    # The defaults are those of the real module, and never changed.
    def initialize(self, local_engine: str, options: dict[str, str] = {}) -> int:  # noqa: B006
        """Starts the engine; "ip:port" listens, "ip" is a client only. Repeated: ignored."""
        name = _text("local_engine", local_engine)
        texts = b""
        for key, value in expect("options", options, dict).items():
            texts += _text("an option's key", key) + b"\0" + _text(f"option {key}", value) + b"\0"
        return library.call("initialize", self._engine, name, texts, len(options))

    def finalize(self) -> None:
        """Ends all links, and stops listening. May be repeated."""
        library.call("finalize", self._engine)

    def register_mem(self, mem: MemDesc, mem_type: MemType, /) -> tuple[int, int]:
        """Makes memory known. Returns a handle, the same for the same range again."""
        expect("mem", mem, MemDesc)
        kind = int(expect("type", mem_type, MemType))
        handle = ctypes.c_uint64()
        status = library.call("register", self._engine, mem.addr, mem.len, kind, handle)
        return status, handle.value

    def deregister_mem(self, handle: int, /) -> int:
        """Forgets memory. FAILED while this engine is connected with any other."""
        return library.call("deregister", self._engine, integer("handle", handle, 0, UINT64_MAX))

    def connect(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """Makes a link to an engine, spelt as it calls itself, to read and write its memory."""
        return self._about_link("connect", remote_engine, timeout_in_millis)

    def connect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """The same in the background; `get_async_connect_status` tells how far it is."""
        return self._about_link("connect_async", remote_engine, timeout_in_millis)

    def disconnect(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """Ends a link and its transfers: when it returns nothing is written any more."""
        return self._about_link("disconnect", remote_engine, timeout_in_millis)

    def disconnect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """The same in the background."""
        return self._about_link("disconnect_async", remote_engine, timeout_in_millis)

    def get_async_connect_status(self, remote_engine: str, /) -> tuple[int, AsyncConnectStatus]:
        """How far a connect or disconnect is."""
        remote, state = _text("remote_engine", remote_engine), ctypes.c_uint32()
        status = library.call("connect_state", self._engine, remote, state)
        return status, AsyncConnectStatus(state.value)

    def get_all_async_connect_status(self) -> tuple[int, dict[str, AsyncConnectStatus]]:
        """The same for all engines that there is or was anything for."""
        status = library.call("connect_states", self._engine)
        return status, {text[1:]: AsyncConnectStatus(int(text[0])) for text in library.list_texts()}

    def transfer_sync(
        self,
        remote_engine: str,
        operation: TransferOp,
        op_descs: Sequence[TransferOpDesc],
        /,
        timeout_in_millis: int = 1000,
    ) -> int:
        """Reads or writes, and returns when all is moved. One that timed out still goes on."""
        write, pieces = _pieces(operation, op_descs)
        remote, limit = _text("remote_engine", remote_engine), milliseconds(timeout_in_millis)
        return library.call(
            "transfer_sync", self._engine, remote, write, pieces, len(pieces), limit
        )

    def transfer_async(
        self,
        remote_engine: str,
        operation: TransferOp,
        op_descs: Sequence[TransferOpDesc],
        /,
        args: TransferArgs = TransferArgs(),  # noqa: B008
    ) -> tuple[int, int]:
        """Begins to read or write. Returns a request, to be asked for until it is over."""
        write, pieces = _pieces(operation, op_descs)
        user_data = expect("args", args, TransferArgs).user_data
        remote, request = _text("remote_engine", remote_engine), ctypes.c_uint64()
        given = (remote, write, pieces, len(pieces), user_data, request)
        status = library.call("transfer_async", self._engine, *given)
        return status, request.value

    def get_transfer_status(self, request: int, /) -> tuple[int, TransferStatus]:
        """How far a request is. Once it is over it is freed, and unknown from then on."""
        number, state = integer("request", request, 0, UINT64_MAX), ctypes.c_uint32()
        status = library.call("transfer_state", self._engine, number, state)
        return status, TransferStatus(state.value)

    def get_all_transfer_status(
        self, args: GetTransferStatusArgs, /
    ) -> tuple[int, list[TransferResult]]:
        """How far all requests are; needs LocalCommRes 1.3."""
        expect("args", args, GetTransferStatusArgs)
        limits = args.max_query_count, args.skip_waiting
        status = library.call("transfer_states", self._engine, *limits)
        reports = _REPORT.iter_unpack(library.list_bytes())
        return status, [
            TransferResult(request, user_data, TransferStatus(state))
            for request, user_data, state in reports
        ]

    def send_notify(
        self, remote_engine: str, notify: NotifyDesc, /, timeout_in_millis: int = 1000
    ) -> int:
        """Leaves a message with the program of a linked engine."""
        expect("notify", notify, NotifyDesc)
        remote, limit = _text("remote_engine", remote_engine), milliseconds(timeout_in_millis)
        texts = notify.name.encode(), notify.notify_msg.encode()
        return library.call("send_notify", self._engine, remote, *texts, limit)

    def get_notifies(self) -> tuple[int, list[NotifyDesc]]:
        """Takes the messages that others have left."""
        status = library.call("get_notifies", self._engine)
        texts = library.list_texts()
        return status, [NotifyDesc(name, text) for name, text in zip(texts, texts, strict=True)]

    def _about_link(self, function: str, remote_engine: object, timeout_in_millis: object) -> int:
        remote, limit = _text("remote_engine", remote_engine), milliseconds(timeout_in_millis)
        return library.call(function, self._engine, remote, limit)


def _text(name: str, value: object) -> bytes:
    return expect(name, value, str).encode()


def _pieces(operation: object, op_descs: object) -> tuple[int, ctypes.Array[library.Piece]]:
    """Whether to write, and the pieces, which may change as soon as the call has returned."""
    write = int(expect("operation", operation, TransferOp))
    if not isinstance(op_descs, Sequence):
        raise TypeError(f"op_descs must be a list, but is {type(op_descs).__name__}")
    descs = [expect("op_descs", desc, TransferOpDesc) for desc in op_descs]
    return write, library.pieces_array(
        [(desc.local_addr, desc.remote_addr, desc.len) for desc in descs]
    )

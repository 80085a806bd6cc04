# SPDX-License-Identifier: Apache-2.0
"""`Hixl`, the engine itself. Nothing raises but a TypeError for an argument of a wrong type."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from ascend_sim.hixl import runtime
from ascend_sim.hixl.connections import Connections
from ascend_sim.hixl.constants import (
    FAILED,
    FEATURE_SUPPORTED,
    MAX_NOTIFY_CHARACTERS,
    NOT_CONNECTED,
    NOTIFY_FAILED,
    PARAM_INVALID,
    RESOURCE_EXHAUSTED,
    SUCCESS,
    TIMEOUT,
    UNSUPPORTED,
)
from ascend_sim.hixl.links import Link
from ascend_sim.hixl.memory import LocalMemory
from ascend_sim.hixl.options import Options, parse_engine
from ascend_sim.hixl.server import Server
from ascend_sim.hixl.transfers import Requests, Transfer
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
from ascend_sim.hixl.wire import Deadline

logger = logging.getLogger("hixl")


def get_capability(feature: FeatureType, /) -> tuple[int, int]:
    """Whether a feature is there: both are."""
    expect("feature", feature, FeatureType)
    return SUCCESS, FEATURE_SUPPORTED


class _Core:
    """What an engine has from initialize to finalize."""

    def __init__(self, name: str, options: Options) -> None:
        """Starts the engine.

        Raises:
            ValueError: the name is no engine name.
            OSError: the address can't be listened on.
        """
        host, port = parse_engine(name)
        self.options = options
        self.pid = os.getpid()
        self.context = runtime.current_context()
        self.memory = LocalMemory(runtime.current_device())
        self.server = Server(name, host, port, self.memory) if port else None
        self.requests = Requests()
        self.connections = Connections(name, options, self.requests.forget)

    def end(self) -> None:
        self.connections.end()
        self.requests.end()
        self.memory.end()
        if self.server is not None:
            self.server.stop()


class Hixl:
    """One engine: it reads and writes the registered memory of others, and they read and write its.

    Calls belong to the thread that initialised it, or to threads with the same AscendCL context.
    """

    def __init__(self) -> None:
        self._core: _Core | None = None
        self._lock = threading.Lock()

    # The defaults are those of the real module, and never changed.
    def initialize(self, local_engine: str, options: dict[str, str] = {}) -> int:  # noqa: B006
        """Starts the engine; "ip:port" listens, "ip" is a client only. Repeated: ignored."""
        expect("local_engine", local_engine, str)
        for key, value in expect("options", options, dict).items():
            expect("an option's key", key, str)
            expect(f"option {key}", value, str)
        with self._lock:
            if self._core is not None:
                return SUCCESS
            if runtime.current_context() == 0:
                logger.error("initialize: this thread has no AscendCL context: set the device")
                return FAILED
            status = runtime.fault("hixl.initialize")
            if status:
                return status
            try:
                self._core = _Core(local_engine, Options.parse(options))
            except ValueError as error:
                logger.error("initialize: %s", error)
                return PARAM_INVALID
            except OSError as error:
                logger.error("initialize: cannot listen on %s: %s", local_engine, error)
                return FAILED
            return SUCCESS

    def finalize(self) -> None:
        """Ends all links, and stops listening. May be repeated."""
        with self._lock:
            core, self._core = self._core, None
        if core is not None and core.pid == os.getpid():
            core.end()

    def register_mem(self, mem: MemDesc, mem_type: MemType, /) -> tuple[int, int]:
        """Makes memory known. Returns a handle, the same for the same range again."""
        expect("mem", mem, MemDesc)
        expect("type", mem_type, MemType)
        core = self._enter("register_mem")
        if isinstance(core, int):
            return core, 0
        return core.memory.register(mem.addr, mem.len, mem_type)

    def deregister_mem(self, handle: int, /) -> int:
        """Forgets memory; transfers that use it fail."""
        integer("handle", handle, 0, UINT64_MAX)
        core = self._enter("deregister_mem")
        return core if isinstance(core, int) else core.memory.deregister(handle)

    def connect(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """Makes a link to an engine, spelt as it calls itself, to read and write its memory."""
        core = self._enter_for("connect", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        return core.connections.connect(remote_engine, _deadline(timeout_in_millis))

    def connect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """The same in the background; `get_async_connect_status` tells how far it is."""
        core = self._enter_for("connect_async", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        return core.connections.connect_async(remote_engine, _deadline(timeout_in_millis))

    def disconnect(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """Ends a link and its transfers: when it returns nothing is written any more."""
        core = self._enter_for("disconnect", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        return core.connections.disconnect(remote_engine, _deadline(timeout_in_millis))

    def disconnect_async(self, remote_engine: str, timeout_in_millis: int = 1000) -> int:
        """The same in the background."""
        core = self._enter_for("disconnect_async", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        return core.connections.disconnect_async(remote_engine, _deadline(timeout_in_millis))

    def get_async_connect_status(self, remote_engine: str, /) -> tuple[int, AsyncConnectStatus]:
        """How far a connect or disconnect is."""
        expect("remote_engine", remote_engine, str)
        core = self._enter("get_async_connect_status")
        if isinstance(core, int):
            return core, AsyncConnectStatus.NOT_CONNECT
        return SUCCESS, core.connections.state(remote_engine)

    def get_all_async_connect_status(self) -> tuple[int, dict[str, AsyncConnectStatus]]:
        """The same for all engines that there is or was anything for."""
        core = self._enter("get_all_async_connect_status")
        return (core, {}) if isinstance(core, int) else (SUCCESS, core.connections.states())

    def transfer_sync(
        self,
        remote_engine: str,
        operation: TransferOp,
        op_descs: Sequence[TransferOpDesc],
        /,
        timeout_in_millis: int = 1000,
    ) -> int:
        """Reads or writes, and returns when all is moved. One that timed out still goes on."""
        pieces = _pieces(operation, op_descs)
        core = self._enter_for("transfer_sync", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        deadline = _deadline(timeout_in_millis)
        link = core.connections.reach(remote_engine, deadline)
        if isinstance(link, int):
            return link
        staging = core.options.staging
        transfer = _prepare(core, link, operation, pieces, staging=staging)
        if isinstance(transfer, int):
            return transfer
        if not transfer.finish(deadline):
            logger.error("transfer_sync: %s: %d ms are over", remote_engine, timeout_in_millis)
            core.requests.abandon(transfer)
            return TIMEOUT
        return SUCCESS if transfer.status is TransferStatus.COMPLETED else FAILED

    def transfer_async(
        self,
        remote_engine: str,
        operation: TransferOp,
        op_descs: Sequence[TransferOpDesc],
        /,
        args: TransferArgs = TransferArgs(),  # noqa: B008
    ) -> tuple[int, int]:
        """Begins to read or write. Returns a request, to be asked for until it is over."""
        pieces = _pieces(operation, op_descs)
        expect("args", args, TransferArgs)
        expect("remote_engine", remote_engine, str)
        core = self._enter("transfer_async")
        if isinstance(core, int):
            return core, 0
        link = core.connections.reach(remote_engine, _deadline(1000))
        if isinstance(link, int):
            return link, 0
        transfer = _prepare(core, link, operation, pieces, staging=False, user_data=args.user_data)
        if isinstance(transfer, int):
            return transfer, 0
        request = core.requests.submit(transfer)
        return (RESOURCE_EXHAUSTED, 0) if request is None else (SUCCESS, request)

    def get_transfer_status(self, request: int, /) -> tuple[int, TransferStatus]:
        """How far a request is. Once it is over it is freed, and unknown from then on."""
        integer("request", request, 0, UINT64_MAX)
        core = self._enter("get_transfer_status")
        if isinstance(core, int):
            return core, TransferStatus.FAILED
        status = core.requests.poll(request)
        if status is None:
            logger.error("get_transfer_status: unknown request %d", request)
            return PARAM_INVALID, TransferStatus.FAILED
        return SUCCESS, status

    def get_all_transfer_status(
        self, args: GetTransferStatusArgs, /
    ) -> tuple[int, list[TransferResult]]:
        """How far all requests are; needs LocalCommRes 1.3."""
        expect("args", args, GetTransferStatusArgs)
        core = self._enter("get_all_transfer_status")
        if isinstance(core, int):
            return core, []
        if not core.options.new_resources:
            return UNSUPPORTED, []
        return SUCCESS, core.requests.poll_all(args)

    def send_notify(
        self, remote_engine: str, notify: NotifyDesc, /, timeout_in_millis: int = 1000
    ) -> int:
        """Leaves a message with the program of a linked engine."""
        expect("notify", notify, NotifyDesc)
        core = self._enter_for("send_notify", remote_engine, timeout_in_millis)
        if isinstance(core, int):
            return core
        if max(len(notify.name), len(notify.notify_msg)) > MAX_NOTIFY_CHARACTERS:
            logger.error("send_notify: more than %d characters", MAX_NOTIFY_CHARACTERS)
            return PARAM_INVALID
        link = core.connections.find(remote_engine)
        if link is None:
            return NOT_CONNECTED
        try:
            kept = link.notify(notify.name, notify.notify_msg, _deadline(timeout_in_millis))
        except TimeoutError:
            return TIMEOUT
        except OSError as error:
            logger.error("send_notify: %s: %s", remote_engine, error)
            return NOTIFY_FAILED
        return SUCCESS if kept else NOTIFY_FAILED

    def get_notifies(self) -> tuple[int, list[NotifyDesc]]:
        """Takes the messages that others have left."""
        core = self._enter("get_notifies")
        if isinstance(core, int):
            return core, []
        taken = [] if core.server is None else core.server.inbox.take()
        return SUCCESS, [NotifyDesc(name, text) for name, text in taken]

    def _enter_for(self, function: str, remote: object, timeout_in_millis: object) -> _Core | int:
        """For a call with a peer and a time limit."""
        expect("remote_engine", remote, str)
        limit = milliseconds(timeout_in_millis)
        core = self._enter(function)
        if not isinstance(core, int) and limit <= 0:
            logger.error("%s: timeout_in_millis=%d must be positive", function, limit)
            return PARAM_INVALID
        return core

    def _enter(self, function: str) -> _Core | int:
        """The engine for a call, or the status of a call that is refused."""
        core = self._core
        if core is None or core.pid != os.getpid():
            logger.error("%s: the engine is not initialized in this process", function)
            return FAILED
        if runtime.current_context() != core.context:
            logger.error(
                "%s: this thread does not have the AscendCL context of the thread that initialized "
                "the engine: set the device in every thread that calls it",
                function,
            )
            return FAILED
        return runtime.fault(f"hixl.{function}") or core


def _deadline(timeout_in_millis: int) -> Deadline:
    return Deadline(timeout_in_millis / 1000)


def _pieces(operation: object, op_descs: object) -> list[runtime.Piece]:
    """The pieces of a transfer; its arguments may change as soon as the call has returned."""
    expect("operation", operation, TransferOp)
    if not isinstance(op_descs, Sequence):
        raise TypeError(f"op_descs must be a list, but is {type(op_descs).__name__}")
    descs = [expect("op_descs", desc, TransferOpDesc) for desc in op_descs]
    return [(desc.local_addr, desc.remote_addr, desc.len) for desc in descs]


def _prepare(
    core: _Core,
    link: Link,
    operation: TransferOp,
    pieces: Sequence[runtime.Piece],
    *,
    staging: bool,
    user_data: int = 0,
) -> Transfer | int:
    """A transfer that may begin, or the status of one that may not."""
    status = _check(core, link, pieces, staging=staging)
    if status:
        return status
    if not runtime.device_answers():
        logger.error("the device does not answer")
        return FAILED

    def local_alias(addr: int, length: int) -> int | None:
        # Not registered: host memory, or a wild address. Which of them, moving the bytes will show.
        alias = core.memory.ranges.alias(addr, length)
        return addr if alias is None and staging else alias

    transfer = Transfer(link, operation is TransferOp.WRITE, pieces, local_alias, user_data)
    if runtime.fault("hixl.link"):
        link.drop()
    code = runtime.fault("hixl.move")
    if code == TIMEOUT:
        transfer.hangs = True
    elif code:
        transfer.fail()
    return transfer


def _check(core: _Core, link: Link, pieces: Sequence[runtime.Piece], *, staging: bool) -> int:
    """Whether the memory of a transfer is fit for it: a status."""
    if not pieces:
        logger.error("a transfer of no pieces")
        return PARAM_INVALID
    ranges = link.ranges()
    if ranges is None:
        logger.error("%s: the link is lost", link.remote)
        return FAILED
    kinds = set()
    for local, remote, length in pieces:
        if 0 in (local, remote, length) or max(local, remote) + length > UINT64_MAX:
            logger.error("%d bytes at %#x, remote %#x: not a range", length, local, remote)
            return PARAM_INVALID
        here = core.memory.ranges.holding(local, length)
        if here is None and not staging:
            logger.error("%d bytes at %#x are not registered", length, local)
            return PARAM_INVALID
        there = ranges.holding(remote, length)
        if there is None:
            logger.error("%d bytes at %#x are not registered by the peer", length, remote)
            return FAILED if staging else PARAM_INVALID
        kinds.add((here is not None and here.is_device, there.is_device))
    if core.options.fabric_mem and len(kinds) > 1:
        logger.error("with fabric memory all pieces of a transfer must be of one kind")
        return PARAM_INVALID
    return SUCCESS

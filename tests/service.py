# SPDX-License-Identifier: Apache-2.0
"""One instance and its caches, by name: what a test tells another process (or this) to do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm_datadist_torch import (
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
)
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.net import connection, unix
from llm_datadist_torch.net.process import start_time
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.transports.choice import LinkChannel
from llm_datadist_torch.transports.local import channel as local_channel
from llm_datadist_torch.transports.local import host
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.values.deadline import Deadline
from tests.caches import Caches, Ref


class Failure(NamedTuple):
    """An exception that came out of an operation, fit for a pipe."""

    kind: str
    status: str
    text: str


class Service(Caches):
    """One instance and its caches, by name. Everything that goes in and out can be pickled."""

    # -- life -------------------------------------------------------------------------------------

    def start(
        self,
        cluster_id: int,
        *,
        remote: bool = False,
        timeout_ms: int = 20_000,
        listen: str | None = "127.0.0.1:0",
        pool: str | None = None,
        options: dict[str, str] | None = None,
        device: str = "auto",
    ) -> int:
        """Returns the port."""
        config = LLMConfig()
        config.device_id = 0
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = remote
        config.sync_kv_timeout = timeout_ms
        if device != "auto":
            config.device = device
        if listen is not None:
            config.listen_ip_info = listen
        if pool is not None:
            config.mem_pool_cfg = pool
        self.datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        self.datadist.init(config.generate_options() | (options or {}))
        self.tables: list[int] = []
        address = self.datadist.listen_address
        return 0 if address is None else address[1]

    def finish(self) -> None:
        if self.datadist is not None:
            self.datadist.finalize()
        self.held.clear()

    def pid(self) -> int:
        return os.getpid()

    def listening(self) -> tuple[str, int] | None:
        return self.dd.listen_address

    def see(self, directory: str) -> None:
        """Packages in a directory are installed from now on."""
        sys.path.insert(0, directory)

    # -- links ------------------------------------------------------------------------------------

    def link(
        self, peer: int, port: int, timeout: int = 10_000, ip: str = "127.0.0.1"
    ) -> tuple[str, list[str]]:
        overall, each = self.dd.link_clusters([cluster(peer, port, ip)], timeout)
        return overall.name, [status.name for status in each]

    def unlink(
        self, peer: int, port: int | None = None, timeout: int = 10_000, *, force: bool = False
    ) -> tuple[str, list[str]]:
        overall, each = self.dd.unlink_clusters([cluster(peer, port)], timeout, force=force)
        return overall.name, [status.name for status in each]

    def link_by_table(self, name: str, info: dict[int, int], table: str, timeout: int) -> int:
        return self.dd.link(name, info, table, timeout=timeout, wait=True)

    def try_link_by_table(self, name: str, info: dict[int, int], table: str, timeout: int) -> str:
        """The status of what is raised; "" if they have met."""
        try:
            self.tables.append(self.dd.link(name, info, table, timeout=timeout, wait=True))
        except LLMException as error:
            return error.status_code.name
        return ""

    def give_up_tables(self) -> None:
        """End what `try_link_by_table` has made."""
        while self.tables:
            self.dd.unlink(self.tables.pop())

    def begin_link_by_table(self, name: str, info: dict[int, int], table: str, timeout: int) -> int:
        return self.dd.link(name, info, table, timeout=timeout)

    def unlink_by_table(self, comm_id: int) -> None:
        self.dd.unlink(comm_id)

    def transports(self, peer: int) -> tuple[str | None, str | None]:
        """What moves host and device memory on a link."""
        (info,) = (info for info in self.dd.links() if info.peer == peer)
        return info.transport("host"), info.transport("device")

    def link_states(self) -> dict[int, str]:
        return {link.peer: link.state.value for link in self.instance.links.links()}

    def be_forbidden_by_yama(self) -> None:
        """As with ptrace_scope 1: nobody's memory can be read or written by a system call."""
        host._YAMA = Path(self._scratch("1"))

        def forbid(*_: object) -> tuple[int, int]:
            return 0, errno.EPERM

        calls = {**vars(local_channel._C), "read_process": forbid, "write_process": forbid}
        local_channel._C = types.SimpleNamespace(**calls)  # type: ignore[assignment]

    def note_prctl(self) -> None:
        self._prctl: list[tuple[int, int]] = []

        def prctl(option: int, argument: ctypes.c_ulong, *_: int) -> int:
            self._prctl.append((option, argument.value))
            return 0

        host.ctypes = types.SimpleNamespace(  # type: ignore[attr-defined]
            CDLL=lambda *_, **__: types.SimpleNamespace(prctl=prctl), c_ulong=ctypes.c_ulong
        )

    def noted_prctl(self) -> list[tuple[int, int]]:
        return self._prctl

    @staticmethod
    def _scratch(text: str) -> str:
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(text)
        return file.name

    def own_pid(self) -> int:
        return os.getpid()

    def _info(self, peer: int) -> LinkInfo:
        return next(info for info in self.dd.links() if info.peer == peer)

    def reason(self, peer: int) -> str:
        """Why host memory goes the way that it goes."""
        return next(each.reason for each in self._info(peer).choices if each.memory == "host")

    def identified_by(self, peer: int) -> str:
        return self._info(peer).identified_by

    def paths(self) -> set[str]:
        """By which paths bytes have gone."""
        return {path for each in self.dd.stats().transfers for path in each.path.split("/")[-1:]}

    def mapped_bytes(self, peer: int) -> int:
        """Of a peer's memory, by the transport local."""
        channel = self.instance.links.registry.get(peer).channel
        return channel._channels["local"].mapped_bytes

    def listening_port(self) -> int:
        assert self.dd.listen_address is not None
        return self.dd.listen_address[1]

    def lose(self, peer: int, port: int) -> None:
        """The link to a peer at this port is lost, for both sides."""
        links = self.instance.links
        link = links.registry.get(peer)
        link.address = ("127.0.0.1", port)
        if link.state is LinkState.LINKED:
            loop = links.endpoint.loop
            loop.call(lambda: link.connection.end("the test has it so"))

    def cut(self) -> None:
        """All connections of links end, as by a reset in the network; the processes go on."""
        for link in self.instance.links.links():
            sock = link.connection._sock
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)

    def say_that_it_is(self, pid: int) -> None:
        """What this process tells of itself from now on."""
        me = HostIdentity.of_this_process()
        lie = HostIdentity(me.boot_id, me.pid_namespace, pid, start_time(pid))
        HostIdentity.of_this_process = classmethod(lambda cls: lie)  # type: ignore[method-assign]

    def have_no_pidfd(self) -> None:
        """As on a kernel before 5.3."""
        unix.own_pidfd = lambda: -1

    def watch_hosts(self, patch: Any = None) -> None:
        """Hosts that have gone are noticed within 2 s from now on, not 20."""
        seconds = dict.fromkeys(connection.KEEPALIVE_S, 1)
        for name, value in (("KEEPALIVE_S", seconds), ("UNACKNOWLEDGED_MS", 2000)):
            if patch is None:
                setattr(connection, name, value)
            else:
                patch.setattr(connection, name, value)

    def hold_the_gil(self, seconds: float) -> None:
        """No other thread of this process runs Python meanwhile."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))

    def fork_a_child(self, seconds: float) -> int:
        """A child that does nothing for a while; returns its process id."""
        child = os.fork()
        if child == 0:
            time.sleep(seconds)
            os._exit(0)
        return child

    def on_request_echo(self) -> None:
        """Requests are answered by themselves from now on."""
        self.dd.on_request(lambda _peer, payload: payload)

    def relink(self, peer: int) -> None:
        """Find the link, or make it anew."""
        with contextlib.suppress(LLMException):
            self.instance.links.use(peer, Deadline.after_ms(5000))

    # -- operations -------------------------------------------------------------------------------

    def run(self, operation: str, *args: Any, **kwargs: Any) -> None:
        """One operation of the cache manager."""
        call = getattr(self.manager, operation)
        call(*map(self._real, args), **{key: self._real(arg) for key, arg in kwargs.items()})

    def attempt(self, operation: str, *args: Any, **kwargs: Any) -> Failure | None:
        """The same, returning what went wrong."""
        try:
            self.run(operation, *args, **kwargs)
        except LLMException as error:
            return Failure(type(error).__name__, error.status_code.name, str(error))
        except (TypeError, ValueError, AttributeError) as error:
            return Failure(type(error).__name__, "", str(error))
        return None

    def hammer(
        self, operation: str, *args: Any, seconds: float = 30.0
    ) -> tuple[int, Failure | None]:
        """Repeat an operation until it fails or the time is up."""
        end = time.monotonic() + seconds
        count = 0
        while time.monotonic() < end:
            failure = self.attempt(operation, *args)
            if failure is not None:
                return count, failure
            count += 1
        return count, None

    def _real(self, arg: Any) -> Any:
        return self.held[arg.name].cache if isinstance(arg, Ref) else arg

    # -- looking inside ---------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        catalog = self.instance.catalog
        return {
            "caches": len(catalog),
            "keys": catalog.num_keys,
            "leases": sum(entry.leases for entry in list(catalog._entries.values())),
            "grants": sum(len(link.grants) for link in self.instance.links.links()),
        }

    def resources(self) -> dict[str, int]:
        """What could leak in this process."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {
            "fds": len(list(Path("/proc/self/fd").iterdir())),
            "maps": len(maps),
            "shared": sum("memfd:llm_datadist" in line for line in maps),
            "threads": len(list(Path("/proc/self/task").iterdir())),
        }

    def pool_stats(self) -> tuple[int, int, int, int]:
        stats = self.instance.memory(Placement.DEVICE)._arena.stats()
        return tuple(stats)

    def arena_in_use(self) -> int:
        return self.pool_stats()[3]

    def only_relay(self, peer: int) -> None:
        """Close every other path of the link."""
        link = self.instance.links.find(peer).channel
        for name in link._channels.keys() - {"local"}:
            link._channels.pop(name).close()
        channel = link._channels["local"]
        channel._paths = tuple(path for path in channel._paths if path.name == "relay")
        link._bind()

    def set_environment(self, values: dict[str, str]) -> None:
        """Variables of this process, for libraries that it loads from now on."""
        os.environ.update(values)

    def enter_network(self, namespace: str) -> None:
        """Threads that this one starts from now on, and itself, are in a network namespace."""
        with Path(f"/run/netns/{namespace}").open() as file:
            if ctypes.CDLL(None).setns(file.fileno(), 0x40000000):
                raise OSError("setns failed")
        # /sys goes on showing the devices of the namespace it was mounted in: a new mount, for us.
        libc = ctypes.CDLL(None, use_errno=True)
        slaves = 0x4000 | 0x80000
        if (
            libc.unshare(0x20000)
            or libc.mount(b"none", b"/", None, slaves, None)
            or libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
        ):
            raise OSError(ctypes.get_errno(), "the mounts of a network namespace")

    def become(self, user: int) -> None:
        """Gives up root: from now on the kernel keeps other users' memory from this process."""
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)

    def note_paths(self) -> None:
        """Record the paths of movements and the warnings from now on, for :meth:`noted`."""
        self._paths: list[str] = []
        self._warnings: list[str] = []
        move = LinkChannel.move

        def noted(channel: LinkChannel, movement: Any, deadline: Any) -> str:
            self._paths.append(move(channel, movement, deadline))
            return self._paths[-1]

        LinkChannel.move = noted  # type: ignore[method-assign]
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("llm_datadist_torch").addHandler(handler)

    def noted(self) -> tuple[list[str], list[str]]:
        return self._paths, self._warnings

    def slow_moves(self, seconds: float, begun: str | None = None) -> None:
        """Every movement that this process carries out takes its time first.

        One that has begun makes the file ``begun``.
        """
        move = LinkChannel.move

        def slow(self: LinkChannel, movement: Any, deadline: Any) -> str:
            if begun is not None:
                Path(begun).touch()
            time.sleep(seconds)
            return move(self, movement, deadline)

        LinkChannel.move = slow  # type: ignore[method-assign]

    def hold_moves(self, path: str) -> None:
        """Every movement that this process carries out waits until this file is there."""
        move = LinkChannel.move

        def held(self: LinkChannel, movement: Any, deadline: Any) -> str:
            while not Path(path).exists():
                time.sleep(0.01)
            return move(self, movement, deadline)

        LinkChannel.move = held  # type: ignore[method-assign]

    def fail(self, text: str) -> None:
        raise RuntimeError(text)

    def leave(self) -> None:
        """End at once, without any clean-up."""
        os._exit(0)

    def hang(self) -> None:
        time.sleep(3600)


def cluster(peer: int, port: int | None, ip: str = "127.0.0.1") -> LLMClusterInfo:
    """The peer at a local port."""
    info = LLMClusterInfo()
    info.remote_cluster_id = peer
    info.append_local_ip_info(ip, 0)
    if port is not None:
        info.append_remote_ip_info(ip, port)
    return info


def eventually(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Wait until a condition holds, and return what it returned last."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.005)

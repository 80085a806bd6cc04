# SPDX-License-Identifier: Apache-2.0
"""Which process is at the other end of a Unix socket, and whether it still is."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import suppress
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")
_FDINFO_BYTES = 4096


class PeerProcess:
    """The process of a peer on this host.

    It is known by a pidfd that the peer has opened of itself and sent over, so that a later
    process with its pid is never taken for it. A kernel without pidfds (before 5.3) leaves the pid
    that the kernel vouches for, and the time when that process started.

    The pidfd is closed with this object: code that accesses the process's memory keeps a
    reference, so that the descriptor's number can't be reused meanwhile.

    Thread safety: all methods may be called from any thread.

    Attributes:
        pid: Its process id as seen from here; 0 where it is in a PID namespace that is not
            visible from ours.
        uid: The user that it belonged to when it connected.
        start_time: When it started, in clock ticks after boot; -1 where a pidfd says more, or it is
            not known.
        identified_by: "pidfd" or "pid and start time"; "" where nothing identifies it.
    """

    def __init__(self, pid: int, uid: int, pidfd: int) -> None:
        self.pid, self.uid = pid, uid
        self._pidfd = pidfd
        self.start_time = start_time(pid) if pid > 0 and pidfd < 0 else -1
        if pidfd >= 0:
            self.identified_by = "pidfd"
        else:
            self.identified_by = "pid and start time" if self.start_time >= 0 else ""

    @classmethod
    def of_socket(cls, connected: socket.socket, pidfd: int) -> PeerProcess:
        """The process at the other end.

        Args:
            connected: A Unix socket.
            pidfd: What the peer has sent as a pidfd of itself, owned by the result; -1 for none. It
                counts only if it is one, of the process that the kernel says has connected.
        """
        raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        if pidfd >= 0 and pid_of(pidfd) != pid:
            os.close(pidfd)
            pidfd = -1
        return cls(pid, uid, pidfd)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs. A zombie does not: its memory is gone."""
        if self._pidfd >= 0:
            return not select_readable(self._pidfd)
        return self.start_time >= 0 and start_time(self.pid) == self.start_time

    @property
    def is_this_one(self) -> bool:
        """Whether it is the process that asks."""
        return self.pid == os.getpid()

    def fileno(self) -> int:
        """The pidfd, which can be read once the process has ended; -1 for none."""
        return self._pidfd

    def close(self) -> None:
        """Close the pidfd before its time: in a forked child, where nobody uses it. Idempotent."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __del__(self) -> None:
        self.close()


def own_pidfd() -> int:
    """A pidfd of this process; -1 where the kernel has none. The caller closes it."""
    try:
        return os.pidfd_open(os.getpid())
    except (OSError, AttributeError):
        return -1


def pid_of(pidfd: int) -> int | None:
    """The process id that a pidfd stands for, 0 for one that is not visible; None: no pidfd."""
    # Not by pathlib: each link does this once.
    with suppress(OSError, ValueError, IndexError):
        info = os.open(f"/proc/self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(info, _FDINFO_BYTES)
        finally:
            os.close(info)
        return int(text.split(b"\nPid:", 1)[1].split(None, 1)[0])
    return None


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks after boot; -1 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return -1
    fields = stat[stat.rindex(b")") + 2 :].split()
    # A zombie has exited: its memory is gone although its pid is not.
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def select_readable(descriptor: int) -> bool:
    """Whether a descriptor can be read now."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))

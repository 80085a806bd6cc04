# SPDX-License-Identifier: Apache-2.0
"""Who a process is on its host, and why the kernel might keep two processes apart."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path

import msgspec

from llm_datadist_torch.net.process import PeerProcess, start_time

logger = logging.getLogger("llm_datadist_torch")

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, 2**64 - 1
HOST_ONLY = "its device memory is host memory"
"""Why an instance whose ``Placement.DEVICE`` is the CPU has no device memory to share."""

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class HostIdentity(msgspec.Struct, frozen=True, array_like=True):
    """What a process says of itself: which one it is, on which host. Anybody could say the same.

    Attributes:
        boot_id: The running kernel, so the host (two containers on one host have the same).
        pid_namespace: Inode of the process's pid namespace: only inside one do pids mean the same.
        pid: Process id.
        start_time: When the process started, in clock ticks after boot: tells a process from a
            later one with its pid.
    """

    boot_id: str
    pid_namespace: int
    pid: int
    start_time: int

    @classmethod
    def of_this_process(cls) -> HostIdentity:
        """Read this process's identity."""
        pid = os.getpid()
        return cls(
            _boot_id(),
            Path("/proc/self/ns/pid").stat().st_ino,
            pid,
            start_time(pid),
        )

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (only meaningful in its pid namespace)."""
        return start_time(self.pid) == self.start_time

    def unreachable_from(self, other: HostIdentity, process: PeerProcess | None) -> str:
        """Why ``other``, which is this process, must not reach the memory of a peer in another.

        Empty if nothing speaks against it.

        Args:
            other: This process.
            process: The peer's process, as the kernel knows it by the connection. What a peer says
                of itself is never enough: two clones of one machine have the same boot_id.
        """
        # Another process in another PID namespace may have the same number.
        if self.is_here if process is None else process.pid == other.pid:
            return "the peer says that it is this process, and is not"
        if process is None:
            if self.boot_id != other.boot_id:
                return "the peer is on another host"
            return (
                "nothing proves that the peer is on this host: its connection is no Unix socket"
                " (containers: share the network namespace)"
            )
        return ""

    def seen_as(self, process: PeerProcess) -> HostIdentity:
        """The process that the kernel says the peer is, whatever it says of itself."""
        return HostIdentity(self.boot_id, self.pid_namespace, process.pid, process.start_time)

    @property
    def is_here(self) -> bool:
        """Whether its pid is that of this process or of one of its threads.

        The kernel lets us reach our own memory by either: a peer that is not in this process and
        says so wants us to.
        """
        return os.access(f"/proc/self/task/{self.pid}", os.F_OK)


class LocalOffer(HostIdentity, frozen=True, array_like=True):
    """What the `local` transport tells a peer in the handshake.

    Attributes:
        no_ipc: Why it can't share device memory with other processes; "" if it can.
    """

    no_ipc: str = "it does not offer it"

    @property
    def host_only(self) -> bool:
        """Whether all its memory is host memory."""
        return self.no_ipc == HOST_ONLY


def _boot_id() -> str:
    """The running kernel's id; "" where it can't be had. It only makes a better message."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def allow_ptrace() -> None:
    """Let any process of this user attach to this one, as far as Yama is concerned.

    Yama knows one process, or all, that may. Where the kernel has no Yama, nothing is forbidden.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0) != 0:
        logger.debug("PR_SET_PTRACER: %s", os.strerror(ctypes.get_errno()))


def why_forbidden(number: int, pid: int) -> str:
    """What probably made the kernel refuse access to another process, and the remedy."""
    text = os.strerror(number)
    if number == errno.ENOSYS:
        return f"{text}: this kernel or its seccomp filter has no process_vm_readv/writev"
    try:
        owner = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return f"{text}: process {pid} is gone"
    if owner != os.geteuid():
        return (
            f"{text}: process {pid} belongs to user {owner}, this one to {os.geteuid()};"
            " run both as one user"
        )
    scope = _YAMA.read_text().strip() if _YAMA.exists() else "0"
    if scope != "0":
        return (
            f"{text}: kernel.yama.ptrace_scope is {scope}; set it to 0 (sysctl), let the peer allow"
            " it (LLMConfig.allow_ptrace = True there), grant CAP_SYS_PTRACE, or use caches that"
            " this library allocates: they are shared without it"
        )
    return (
        f"{text}: a security policy (seccomp, SELinux, an undumpable process) forbids it;"
        " grant CAP_SYS_PTRACE"
    )

# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: two processes in network namespaces of their own, and a wire.

The wire is a pair of veth devices, or two TUN devices with a process that passes packets from one
to the other after a delay (``forwarder.c``). Whatever the processes say to each other goes over it,
by whichever ports: a contender can't get around it. Namespaces and devices end with the processes.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import multiprocessing
import os
import shutil
import struct
import subprocess
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

NEAR, FAR = "10.77.0.1", "10.77.0.2"
DEVICE = "wire"
TUN = Path("/dev/net/tun")

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_TUN_MTU = 65520
_QUEUE = 4096


def why_no_hosts() -> str:
    """Why there can't be two hosts here, with the remedy; "" where there can."""
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"no {program}: apt-get install {package}"
    tried = "mount -t sysfs sysfs /sys && ip link add one type veth peer name other"
    command = ["unshare", "--net", "--mount", "sh", "-c", tried]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "it failed").splitlines()[-1]
        return f"no network namespaces with veth ({reason}): run as root, on a kernel that has them"
    return ""


def why_no_delay() -> str:
    """Why there can't be a wire with a delay; "" where there can."""
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        return f"no TUN devices ({error}): run as root, with {TUN} there"
    return ""


def leave() -> None:
    """Give this process, which has no other thread yet, a network of its own: it is a host."""
    _call("unshare", _CLONE_NEWNET | _CLONE_NEWNS)
    # UCX finds devices in /sys, which shows the network of the process that has mounted it.
    _run("mount", "--make-rslave", "/")
    _run("mount", "-t", "sysfs", "sysfs", "/sys")
    # Which of the machine's devices it is to use means nothing here.
    os.environ["UCX_NET_DEVICES"] = DEVICE
    # It says that nobody is authenticated here.
    logging.getLogger("llm_datadist_torch").setLevel(logging.ERROR)


def set_up(address: str) -> None:
    """Use the wire's end, which is there: it gets the address."""
    _ip("addr", "add", f"{address}/24", "dev", DEVICE)
    for device in (DEVICE, "lo"):
        _ip("link", "set", device, "up")


class Wire:
    """What connects this process, which has left the machine's network, with another host.

    Args:
        delay_ms: Added to each packet in each direction; None: a pair of veth, without a forwarder.
    """

    def __init__(self, delay_ms: float | None = None) -> None:
        self._delay_ms = delay_ms
        self._forwarder: multiprocessing.context.SpawnProcess | None = None

    def connect(self, pid: int) -> None:
        """Put the wire's ends here and into the network of a process; sets up the end here."""
        if self._delay_ms is None:
            far = ("peer", "name", DEVICE, "netns", str(pid))
            _ip("link", "add", DEVICE, "type", "veth", *far)
        else:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            args = (theirs, os.getpid(), pid, self._delay_ms)
            self._forwarder = context.Process(target=forward, args=args, daemon=True)
            self._forwarder.start()
            theirs.close()
            ours.recv()
        set_up(NEAR)

    def close(self) -> None:
        """Remove it."""
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.join()
        else:
            with suppress(subprocess.CalledProcessError):
                _ip("link", "del", DEVICE)


def forward(ready: Connection, near: int, far: int, delay_ms: float) -> None:
    """The process that passes packets between the networks of two processes."""
    from benchmarks.peers.loops import library

    code = library("forwarder.c")
    ends = [_tun_in(pid) for pid in (near, far)]
    ready.send("ready")
    code.forward(*ends, ctypes.c_int64(round(delay_ms * 1e6)))


def carried() -> int:
    """Bytes that the wire has carried, both directions, as this host's end counts them."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == DEVICE:
            counts = rest.split()
            return int(counts[0]) + int(counts[8])
    return 0


def _tun_in(pid: int) -> int:
    """A TUN device in the network of a process; this process's thread stays there."""
    place = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        _call("setns", place, _CLONE_NEWNET)
    finally:
        os.close(place)
    tun = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", DEVICE, "mtu", str(_TUN_MTU), "txqueuelen", str(_QUEUE))
    return tun


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")

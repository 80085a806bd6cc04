# SPDX-License-Identifier: Apache-2.0
"""Fault injection: fail or delay the k-th call of a function, take a device away, count calls.

Functions go by their names: those of AscendCL, such as "aclrtMalloc"; "hixl." and the name of one
of the transfer engine; "task." and a name for what is done in a stream, such as
"task.aclrtMemcpyAsync": then the call succeeds, and the stream fails. Calls are counted per
process.

Processes out of reach take the same from ``ASCEND_SIM_FAULTS`` (README.md).
"""

from __future__ import annotations

import ctypes

__all__ = ["count", "counts", "delay", "fail", "reset", "take_device_away"]

_OUT_OF_MEMORY = 207001


def fail(function: str, call: int = 1, *, code: int = _OUT_OF_MEMORY, times: int = 1) -> None:
    """Let calls fail.

    Args:
        function: Its name.
        call: The how manieth call from now on is the first that fails.
        code: The aclError (or status of hixl) that it returns; out of memory if you don't say.
        times: How many calls fail; 0 for all from then on.

    Raises:
        ValueError: A name, a call or a code that there can't be.
        RuntimeError: The simulator isn't active.
    """
    if code == 0:
        raise ValueError("code=0 is no failure")
    _add(function, call, times, str(code))


def delay(function: str, seconds: float, call: int = 1, *, times: int = 1) -> None:
    """Let calls take longer.

    Args:
        function: Its name.
        seconds: How much longer.
        call: The how manieth call from now on is the first.
        times: How many calls; 0 for all from then on.

    Raises:
        ValueError: A name, a call or a time that there can't be.
        RuntimeError: The simulator isn't active.
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds} is no delay")
    _add(function, call, times, f"{seconds}s")


def take_device_away(device: int) -> None:
    """Let everything that is done with a device fail from now on, as if it had died.

    Raises:
        RuntimeError: The simulator isn't active.
    """
    _runtime().ascend_sim_faults_add(f"device={device}".encode())


def counts() -> dict[str, int]:
    """How often each function was called in this process; those never called are not in it.

    Raises:
        RuntimeError: The simulator isn't active.
    """
    runtime = _runtime()
    size = 1 << 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = runtime.ascend_sim_counts(buffer, ctypes.c_size_t(size))
        if needed <= size:
            break
        size = needed * 2
    pairs = [text.rpartition("=") for text in buffer.value.decode().split(";") if text]
    return {name: int(number) for name, _, number in pairs}


def count(function: str) -> int:
    """How often a function was called in this process."""
    return counts().get(function, 0)


def reset() -> None:
    """Forget all faults, also those of the environment. Counts go on.

    Raises:
        RuntimeError: The simulator isn't active.
    """
    _runtime().ascend_sim_faults_reset()


def _add(function: str, call: int, times: int, what: str) -> None:
    if not function or set(function) & set(";=@\0"):
        raise ValueError(f"function={function!r} is no name of a function")
    if call < 1 or times < 0:
        raise ValueError(f"call={call}, times={times}: the first call is 1, and 0 times means all")
    first = count(function) + call
    last = str(first + times - 1) if times else ""
    _runtime().ascend_sim_faults_add(f"{function}@{first}-{last}={what}".encode())


def _runtime() -> ctypes.CDLL:
    """The simulator's library in this process."""
    # Loading it again would only count; a real runtime has no such symbols.
    try:
        runtime = ctypes.CDLL("libascendcl.so")
        runtime.ascend_sim_counts.restype = ctypes.c_size_t
    except (OSError, AttributeError):
        raise RuntimeError(
            "the simulated Ascend runtime isn't active in this process; see ascend_sim.activate()"
        ) from None
    return runtime

# SPDX-License-Identifier: Apache-2.0
"""AscendCL's functions for memory between processes, in the library that torch_npu has loaded."""

from __future__ import annotations

import ctypes
import functools
import os

from llm_datadist_torch.values.device_errors import missing_runtime, runtime_error

KEY_BYTES = 65
"""What AscendCL wants room for; a key ends with a zero byte."""

_LIBRARY = "libascendcl.so"
_NEEDED = ("aclrtIpcMemGetExportKey", "aclrtIpcMemImportByKey", "aclrtIpcMemClose")
_EXPORT_TO_ANYBODY = 1  # ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION
_IMPORT_WITH_PEER_ACCESS = 1  # ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS
_REFUSED_FLAGS = frozenset({107000, 207000})
"""ACL_ERROR_RT_PARAM_INVALID and _FEATURE_NOT_SUPPORT: older releases want 0."""


class IpcRuntime:
    """The functions, as methods; the calling thread must have set its device.

    They are looked up by name, because older releases of CANN lack them. All release the GIL.

    Args:
        library: AscendCL.

    Raises:
        LLMFeatureNotEnabledError: One of those that are needed is not in it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        missing = [name for name in _NEEDED if not hasattr(library, name)]
        if missing:
            raise missing_runtime(f"{_LIBRARY} has no {', '.join(missing)}; CANN 8.3 has them")
        self._library = library
        self._library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self._lists_processes = all(
            hasattr(library, name) for name in ("aclrtIpcMemSetImportPid", "aclrtDeviceGetBareTgid")
        )

    @property
    def guard(self) -> str:
        """What keeps other processes from importing, in words."""
        if self._lists_processes:
            return "for the processes that are named to it"
        return "for every process that has the key"

    def reaches(self, device: int, peer: int) -> bool:
        """Whether one NPU can reach memory of another one."""
        can = ctypes.c_int32()
        code = self._library.aclrtDeviceCanAccessPeer(ctypes.byref(can), device, peer)
        return code == 0 and can.value == 1

    def allocation_of(self, address: int) -> tuple[int, int] | None:
        """Start and bytes of the allocation that an address is in; None where it can't be told."""
        base, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
        function = getattr(self._library, "aclrtMemGetAddressRange", None)
        if function is None:
            return None
        code = function(ctypes.c_void_p(address), ctypes.byref(base), ctypes.byref(nbytes))
        return None if code != 0 or not base.value else (base.value, nbytes.value)

    def export(self, start: int, nbytes: int) -> bytes:
        """A key for an allocation, given as a whole.

        Raises:
            LLMDeviceError: It can't be exported.
        """
        key = ctypes.create_string_buffer(KEY_BYTES)
        self._call(
            "aclrtIpcMemGetExportKey",
            ctypes.c_void_p(start),
            ctypes.c_size_t(nbytes),
            key,
            ctypes.c_size_t(KEY_BYTES),
            ctypes.c_uint64(0 if self._lists_processes else _EXPORT_TO_ANYBODY),
        )
        return key.value

    def allow(self, key: bytes, process: int) -> None:
        """Let a process import by a key of ours; ``process`` is what its own :attr:`us` says.

        Raises:
            LLMDeviceError: The runtime refuses.
        """
        if self._lists_processes:
            pids = (ctypes.c_int32 * 1)(process)
            self._call("aclrtIpcMemSetImportPid", key, pids, ctypes.c_size_t(1))

    @functools.cached_property
    def us(self) -> int:
        """What the driver calls this process; in a container not what ``getpid`` says."""
        number = ctypes.c_int32()
        if self._lists_processes:
            self._call("aclrtDeviceGetBareTgid", ctypes.byref(number))
        return number.value

    def open(self, key: bytes) -> int:
        """The address here of memory that another process has exported; once per key.

        The thread's device may reach it, also if it is on another one.

        Raises:
            LLMDeviceError: The runtime refuses.
        """
        address = ctypes.c_void_p()
        function = self._library.aclrtIpcMemImportByKey
        with_access = ctypes.c_uint64(_IMPORT_WITH_PEER_ACCESS)
        code = function(ctypes.byref(address), key, with_access)
        if code in _REFUSED_FLAGS:
            code = function(ctypes.byref(address), key, ctypes.c_uint64(0))
        self._check("aclrtIpcMemImportByKey", code)
        return address.value or 0

    def close(self, key: bytes) -> None:
        """Let go of what was imported by a key, or end a key of ours that nobody has open.

        Raises:
            LLMDeviceError: The runtime refuses.
        """
        self._call("aclrtIpcMemClose", key)

    def _call(self, name: str, *args: object) -> None:
        self._check(name, getattr(self._library, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            said: bytes | None = self._library.aclGetRecentErrMsg()
            raise runtime_error(name, code, (said or b"").decode(errors="replace"))


@functools.cache
def ipc_runtime() -> IpcRuntime:
    """The functions of this process's runtime.

    Raises:
        LLMFeatureNotEnabledError: There is no Ascend runtime in this process, or it lacks them.
    """
    try:
        # The very library that torch_npu uses; never a second copy of it.
        library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError as error:
        raise missing_runtime(f"{_LIBRARY} is not loaded in this process") from error
    return IpcRuntime(library)

# SPDX-License-Identifier: Apache-2.0
"""``acl.rt``: AscendCL's runtime functions as pyACL names them, on the simulated runtime."""

from __future__ import annotations

import ctypes

__all__ = ["memcpy"]

_aclrt_memcpy = ctypes.CDLL("libascendcl.so").aclrtMemcpy
_aclrt_memcpy.restype = ctypes.c_int
_aclrt_memcpy.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
]


def memcpy(dst: int, dest_max: int, src: int, count: int, kind: int) -> int:
    """Copy memory, and block until that is done (``aclrtMemcpy``).

    Args:
        dst: Address to copy to.
        dest_max: How many bytes there are at `dst`.
        src: Address to copy from.
        count: Number of bytes.
        kind: 0 host to host, 1 host to device, 2 device to host, 3 device to device.

    Returns:
        0, or the runtime's error code.
    """
    return int(_aclrt_memcpy(dst, dest_max, src, count, kind))

# SPDX-License-Identifier: Apache-2.0
"""How long a thread could run and had no processor: the kernel counts it."""

from __future__ import annotations

import os
import threading

_files = threading.local()


def queued_s() -> float:
    """Seconds that the calling thread has waited for a processor in its life."""
    if not hasattr(_files, "schedstat"):
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        _files.schedstat = os.open(path, os.O_RDONLY)
    return int(os.pread(_files.schedstat, 64, 0).split()[1]) / 1e9

# SPDX-License-Identifier: Apache-2.0
"""Our library over CANN's ``libcann_hixl.so``, called through ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

CANN_LIBRARY = "libcann_hixl.so"
"""Found as every library is: by LD_LIBRARY_PATH, which CANN's set_env.sh sets."""

_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_INT, _UINT = ctypes.c_int32, ctypes.c_uint32
_LONG, _SIZE = ctypes.c_uint64, ctypes.c_size_t
_TEXTS = ctypes.POINTER(_TEXT)
_OUT, _OUT_POINTER = ctypes.POINTER(_UINT), ctypes.POINTER(_POINTER)

# name -> what it returns, and its parameters; see csrc/hixl/hixl_port.cpp.
_FUNCTIONS = {
    "load": (_TEXT, (_TEXT,)),
    "path": (_TEXT, ()),
    "supports": (_INT, (_UINT,)),
    "can_be_asked": (_INT, ()),
    "new": (_POINTER, ()),
    "delete": (None, (_POINTER,)),
    "initialize": (_UINT, (_POINTER, _TEXT, _TEXTS, _SIZE)),
    "finalize": (None, (_POINTER,)),
    "register": (_UINT, (_POINTER, _LONG, _LONG, _UINT, _OUT_POINTER)),
    "deregister": (_UINT, (_POINTER, _POINTER)),
    "connect": (_UINT, (_POINTER, _TEXT, _INT)),
    "disconnect": (_UINT, (_POINTER, _TEXT, _INT)),
    "transfer": (
        _UINT,
        (_POINTER, _TEXT, _UINT, *[_POINTER] * 3, _SIZE, _SIZE, _SIZE, _OUT_POINTER),
    ),
    "transfer_state": (_UINT, (_POINTER, _POINTER, _OUT)),
}

Functions = dict[str, Callable[..., Any]]


class NativeLibrary:
    """CANN's class ``hixl::Hixl``, made callable."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    @classmethod
    def load(cls) -> NativeLibrary:
        """Load both libraries; only the first call does something.

        Raises:
            OSError: One of them can't be loaded, or CANN's has not what is needed.
        """
        functions = _our_library()
        why_not = functions["load"](CANN_LIBRARY.encode())
        if why_not:
            raise OSError(f"{CANN_LIBRARY} can't be used: {why_not.decode(errors='replace')}")
        return cls(functions)

    def describe(self) -> str:
        """Which file it is, and of about which CANN."""
        path = self._functions["path"]().decode(errors="replace")
        release = "9.1 or later" if self._functions["can_be_asked"]() else "before 9.1"
        return f"{path} (CANN {release})"

    def supports(self, feature: int) -> bool:
        """Whether this release has a feature."""
        return bool(self._functions["supports"](feature))

    def new_engine(self) -> NativeEngine:
        """An engine that has not been started."""
        return NativeEngine(self._functions)


class NativeEngine:
    """One object of the class ``hixl::Hixl``. Statuses are HIXL's."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._engine = functions["new"]()

    def __del__(self) -> None:
        engine, self._engine = self._engine, None
        if engine:
            self._functions["delete"](engine)

    def initialize(self, address: str, options: Mapping[str, str]) -> int:
        """Start it."""
        texts = [text.encode() for pair in options.items() for text in pair]
        array = (_TEXT * len(texts))(*texts)
        return self._call("initialize", address.encode(), array, len(options))

    def finalize(self) -> None:
        """End it; may be repeated."""
        self._functions["finalize"](self._engine)

    def register(self, address: int, nbytes: int, kind: int) -> tuple[int, int]:
        """Make memory known; returns a status and a handle."""
        handle = _POINTER()
        status = self._call("register", address, nbytes, kind, ctypes.byref(handle))
        return status, handle.value or 0

    def deregister(self, handle: int) -> int:
        """Forget it."""
        return self._call("deregister", handle)

    def connect(self, remote: str, timeout_ms: int) -> int:
        """Connect to another engine."""
        return self._call("connect", remote.encode(), timeout_ms)

    def disconnect(self, remote: str, timeout_ms: int) -> int:
        """End a connection."""
        return self._call("disconnect", remote.encode(), timeout_ms)

    def transfer(
        self,
        remote: str,
        operation: int,
        tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        first: int,
        count: int,
    ) -> tuple[int, int]:
        """Begin a transfer; returns a status and a request.

        Args:
            remote: The other engine.
            operation: 0 reads, 1 writes.
            tables: Local and remote addresses of tensors, int64 [n], and runs, int64 [r, 3].
            first: Number of the first descriptor.
            count: How many.
        """
        local, remotes, runs = (table.contiguous() for table in tables)
        pointers = local.data_ptr(), remotes.data_ptr(), runs.data_ptr()
        request = _POINTER()
        numbers = len(runs), first, count
        status = self._call(
            "transfer", remote.encode(), operation, *pointers, *numbers, ctypes.byref(request)
        )
        return status, request.value or 0

    def transfer_state(self, request: int) -> tuple[int, int]:
        """How far it is."""
        state = _UINT()
        status = self._call("transfer_state", request, ctypes.byref(state))
        return status, state.value

    def _call(self, function: str, *arguments: object) -> int:
        return int(self._functions[function](self._engine, *arguments))


@functools.cache
def _our_library() -> Functions:
    package = Path(__file__).parents[2]
    found = sorted(package.glob("_hixl*.so"))
    if not found:
        raise OSError(f"{package} has no _hixl.so: the package was built without it")
    library = ctypes.CDLL(str(found[0]))
    functions: Functions = {}
    for name, (result, parameters) in _FUNCTIONS.items():
        function = getattr(library, f"llmdd_hixl_{name}")
        function.restype, function.argtypes = result, parameters
        functions[name] = function
    return functions

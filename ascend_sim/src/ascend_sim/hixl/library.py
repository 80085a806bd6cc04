# SPDX-License-Identifier: Apache-2.0
"""The simulated ``libcann_hixl.so``, called through ctypes: one engine for class and module."""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable, Iterator

__all__ = ["Piece", "call", "list_bytes", "list_texts", "new_engine", "pieces_array"]

logger = logging.getLogger("hixl")

_LOG_BYTES = 1 << 16
_LENGTH = struct.Struct("=Q")
_LEVELS = {"E": logging.ERROR, "W": logging.WARNING}


class Piece(ctypes.Structure):
    """AscendSimPiece of sim_api.h."""

    _fields_ = (
        ("local", ctypes.c_uint64),
        ("remote", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_INT, _UINT = ctypes.c_int32, ctypes.c_uint32
_LONG, _SIZE = ctypes.c_uint64, ctypes.c_size_t
_OUT, _OUT_LONG = ctypes.POINTER(_UINT), ctypes.POINTER(_LONG)
_PIECES = ctypes.POINTER(Piece)

# name -> what it returns, and its parameters; see python_face.cpp.
_FUNCTIONS = {
    "new": (_POINTER, ()),
    "initialize": (_UINT, (_POINTER, _TEXT, _TEXT, _SIZE)),
    "finalize": (None, (_POINTER,)),
    "register": (_UINT, (_POINTER, _LONG, _LONG, _UINT, _OUT_LONG)),
    "deregister": (_UINT, (_POINTER, _LONG)),
    "connect": (_UINT, (_POINTER, _TEXT, _INT)),
    "connect_async": (_UINT, (_POINTER, _TEXT, _INT)),
    "disconnect": (_UINT, (_POINTER, _TEXT, _INT)),
    "disconnect_async": (_UINT, (_POINTER, _TEXT, _INT)),
    "connect_state": (_UINT, (_POINTER, _TEXT, _OUT)),
    "connect_states": (_UINT, (_POINTER,)),
    "transfer_sync": (_UINT, (_POINTER, _TEXT, _INT, _PIECES, _SIZE, _INT)),
    "transfer_async": (_UINT, (_POINTER, _TEXT, _INT, _PIECES, _SIZE, _LONG, _OUT_LONG)),
    "transfer_state": (_UINT, (_POINTER, _LONG, _OUT)),
    "transfer_states": (_UINT, (_POINTER, _UINT, _INT)),
    "send_notify": (_UINT, (_POINTER, _TEXT, _TEXT, _TEXT, _INT)),
    "get_notifies": (_UINT, (_POINTER,)),
    "list": (_SIZE, (_TEXT, _SIZE)),
    "log": (_SIZE, (_TEXT, _SIZE)),
    "limit": (_LONG, (_TEXT, _LONG)),
}


def _load() -> dict[str, Callable[..., int]]:
    functions: dict[str, Callable[..., int]] = {}
    try:
        library = ctypes.CDLL("libcann_hixl.so")
        for name, (result, parameters) in _FUNCTIONS.items():
            function = getattr(library, f"ascend_sim_hixl_{name}")
            function.restype, function.argtypes = result, parameters
            functions[name] = function
    except (OSError, AttributeError) as error:
        raise ImportError(
            "this is the simulated module hixl, and the simulated Ascend runtime is not active: "
            "run the program by `python -m ascend_sim -- python program.py`"
            f" ({error})",
            name="hixl",
        ) from error
    return functions


_functions = _load()


def new_engine() -> int:
    """A new engine's address. It lives as long as the process."""
    return _functions["new"]()


def call(function: str, *arguments: object) -> int:
    """Calls a function, and logs what it had to say."""
    result = _functions[function](*arguments)
    buffer = ctypes.create_string_buffer(_LOG_BYTES)
    size = _functions["log"](buffer, _LOG_BYTES)
    for line in buffer.raw[: min(size, _LOG_BYTES)].decode(errors="replace").splitlines():
        logger.log(_LEVELS.get(line[:1], logging.ERROR), "%s", line[1:])
    return result


def list_bytes() -> bytes:
    """The list that this thread's last call has made."""
    size = _functions["list"](None, 0)
    buffer = ctypes.create_string_buffer(size + 1)
    _functions["list"](buffer, size)
    return buffer.raw[:size]


def list_texts() -> Iterator[str]:
    """The same, of texts."""
    data, at = list_bytes(), 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield data[at : at + length].decode()
        at += length


def pieces_array(pieces: list[tuple[int, int, int]]) -> ctypes.Array[Piece]:
    """Pieces (local address, remote address, length) as the library takes them."""
    return (Piece * len(pieces))(*(Piece(*piece) for piece in pieces))

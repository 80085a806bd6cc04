# SPDX-License-Identifier: Apache-2.0
"""The small enumerations of the API: roles, placements, memory types, registration states."""

from __future__ import annotations

from enum import Enum, IntEnum

_INTEGER_PRESENTATIONS = frozenset("bcdnoxX")


class NamedIntEnum(IntEnum):
    """IntEnum whose text is `Class.MEMBER` on every Python version (reference API, 2.1).

    Python 3.11 and 3.12 changed what `str()` and f-strings give for an IntEnum; this base pins
    both. An integer presentation such as `f"{member:#x}"` still formats the number.
    """

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, format_spec: str) -> str:
        if format_spec[-1:] in _INTEGER_PRESENTATIONS:
            return format(int(self), format_spec)
        return format(str(self), format_spec)


class LLMRole(NamedIntEnum):
    """What an instance does in the service. It never limits what it may transfer."""

    PROMPT = 1
    DECODER = 2
    MIX = 3


class Placement(NamedIntEnum):
    """Where the memory of a cache lies. Mind that `Memtype` counts the other way round."""

    HOST = 0
    DEVICE = 1


class Memtype(Enum):
    """Memory type of a `MemInfo`. Mind that `Placement` counts the other way round."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class RegisterMemStatus(Enum):
    """State of the memory exchange that `LLMDataDist.link` starts."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class PushType(Enum):
    """Which kind of key, if any, names the target of a push."""

    NO_CACHE_KEY = 0
    BLOCKS_CACHE_KEY = 1
    CACHE_KEY_BY_ID = 2


int_to_mem_status_dict: dict[int, RegisterMemStatus] = {
    status.value: status for status in RegisterMemStatus
}

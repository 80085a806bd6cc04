# SPDX-License-Identifier: Apache-2.0
"""Checks of the front door's arguments."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from typing import TypeVar

from llm_datadist_torch.values.checks import check_isinstance, param_error

_T = TypeVar("_T")


def choice(name: str, value: object, table: Mapping[str, _T]) -> _T:
    """What a word of a table stands for.

    Raises:
        TypeError: No text.
        LLMParamError: Another word, with the nearest there is.
    """
    check_isinstance(name, value, str, allow_none=False)
    if value not in table:
        nearest = difflib.get_close_matches(str(value), table, n=1)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else None
        raise param_error(f"{name}={value!r} must be one of {', '.join(table)}", remedy=remedy)
    return table[str(value)]


def paged(blocks: int | None, rows: int | None, name: str | int | None, keys: object) -> bool:
    """Whether a blocks cache is wanted; else a contiguous one.

    Raises:
        LLMParamError: Not exactly one of ``blocks`` and ``rows``; a name for rows, keys for blocks.
    """
    if (blocks is None) == (rows is None):
        raise param_error("exactly one of blocks and rows is needed")
    if blocks is None and name is not None:
        raise param_error(
            f"name={name!r}, but rows have keys", remedy="give keys, such as [RequestKey(7)]."
        )
    if rows is None and keys:
        raise param_error("keys are for rows, but blocks are wanted", remedy="give name.")
    return rows is None


def num_tensors(layers: int, tensors_per_layer: int) -> int:
    """How many tensors so many layers have.

    Raises:
        TypeError: Not ints.
        LLMParamError: Less than 1.
    """
    for name, value in (("layers", layers), ("tensors_per_layer", tensors_per_layer)):
        if operator.index(value) < 1:
            raise param_error(f"{name}={value} must be at least 1")
    return operator.index(layers) * operator.index(tensors_per_layer)

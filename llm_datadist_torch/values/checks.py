# SPDX-License-Identifier: Apache-2.0
"""Validators of arguments: TypeError for a wrong type, ValueError outside the C width.

Where an int is asked for, other integers (NumPy's) are taken too, and come back as int: what a
validator returns is what to go on with. A container that has none of them comes back as it is.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeVar, cast, overload

import torch

from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
UINT8_MAX, UINT16_MAX, UINT32_MAX, UINT64_MAX = 2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1

_T = TypeVar("_T")
_Ints = TypeVar("_Ints", bound=Sequence[int])
_Classes = type | tuple[type, ...]

Ids: TypeAlias = "Sequence[int] | torch.Tensor"
_ONLY_INT = {int}
_NO_IDS = torch.empty(0, dtype=torch.int64)
_IDS_AT_ONCE = 1 << 14
"""torch copies 32768 elements and more by OpenMP, whose threads wait for each other by spinning:
tens of milliseconds where another process has the second core, for a copy of 0.1."""


def param_error(message: str, *, remedy: str | None = None) -> LLMException:
    """Builds the LLMParamError (LLM_PARAM_INVALID) for a fault found among the arguments."""
    return error_for(LLMStatusCode.LLM_PARAM_INVALID, message, remedy=remedy)


def shown(value: object) -> str:
    """Returns `repr(value)`, or a word where Python refuses to print an int that long."""
    try:
        return repr(value)
    except ValueError:
        return "<a number too long to print>"


def _names(classes: _Classes) -> str:
    members = classes if isinstance(classes, tuple) else (classes,)
    return " or ".join(member.__name__ for member in members)


def _may_be_int(classes: _Classes) -> bool:
    return int in classes if isinstance(classes, tuple) else classes is int


def _with_ints(values: _T) -> _T:
    """The elements of a list or tuple with every integer of another kind as an int."""
    if not isinstance(values, (list, tuple)):
        return values
    if all(isinstance(value, int) or not isinstance(value, Integral) for value in values):
        return values
    converted = [
        operator.index(value) if isinstance(value, Integral) else value for value in values
    ]
    return cast("_T", converted if isinstance(values, list) else tuple(converted))


def check_isinstance(
    name: str,
    value: _T,
    classes: _Classes,
    inner_class: _Classes | None = None,
    extra_fmt: str = "",
    allow_none: bool = True,
) -> _T:
    """Returns `value` if it is an instance of `classes`, and its elements of `inner_class`.

    As in the reference, None passes unless `allow_none` is False, subclasses pass, and so does bool
    where int is asked for. Of a dict only the keys are looked at (and never converted).

    Args:
        name: name of the argument, for the message.
        value: what to check.
        classes: a class or a tuple of classes.
        inner_class: class or classes of the elements; None does not look at them.
        extra_fmt: text appended to the message as it is.
        allow_none: whether None passes.

    Raises:
        TypeError: the value, or an element, is of another type.
    """
    if value is None and allow_none:
        return value
    if not isinstance(value, classes):
        if isinstance(value, Integral) and _may_be_int(classes):
            return cast("_T", operator.index(value))
        raise TypeError(
            f"{name} only support {_names(classes)}, but got {type(value).__name__}{extra_fmt}"
        )
    if inner_class is not None and isinstance(value, Iterable):
        check_inner(name, value, inner_class)
        return _with_ints(value) if _may_be_int(inner_class) else value
    return value


def check_inner(name: str, values: Iterable[Any], inner_class: _Classes) -> None:
    """Checks every element of `values` (the keys of a dict).

    Raises:
        TypeError: an element is of another type; the message says which.
    """
    for i, element in enumerate(values):
        if not isinstance(element, inner_class) and not (
            isinstance(element, Integral) and _may_be_int(inner_class)
        ):
            raise TypeError(
                f"{name}[{i}] only support {_names(inner_class)}, "
                f"but got {type(element).__name__} {shown(element)}"
            )


def check_dict(
    name: str,
    d: dict[Any, Any],
    k_class: _Classes,
    v_class: _Classes,
    v_inner_class: _Classes | None = None,
) -> None:
    """Checks a dict, its keys, its values and, if asked, the elements of its values.

    Raises:
        AttributeError: `d` is None (the reference's type for it).
        TypeError: anything else of a wrong type.
    """
    if d is None:
        raise AttributeError(f"{name} only support dict, but got None")
    check_isinstance(name, d, dict)
    for key, value in d.items():
        check_isinstance(f"key of {name}", key, k_class, allow_none=False)
        check_isinstance(f"{name}[{shown(key)}]", value, v_class, v_inner_class, allow_none=False)


def _check_int(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int):
        if not isinstance(value, Integral):
            raise TypeError(f"{name} only support int, but got {type(value).__name__} {value!r}")
        value = operator.index(value)
    if not low <= value <= high:
        raise ValueError(f"{name}={shown(int(value))} is out of range [{low}, {high}]")
    return value


def check_uint8(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, 0, UINT8_MAX)


def check_uint16(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, 0, UINT16_MAX)


def check_uint32(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, 0, UINT32_MAX)


def check_uint64(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, 0, UINT64_MAX)


def check_int32(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, INT32_MIN, INT32_MAX)


def check_timeout_ms(timeout: int) -> int:
    """Returns a `timeout` argument in milliseconds, as an int.

    Raises:
        TypeError: no int.
        ValueError: outside int32.
        LLMParamError: not positive.
    """
    timeout = check_int32("timeout", timeout)
    if timeout <= 0:
        raise param_error(f"timeout={timeout} must be positive")
    return timeout


def check_int64(name: str, value: int) -> int:
    """Returns `value` if it is an int that fits (TypeError, ValueError otherwise)."""
    return _check_int(name, value, INT64_MIN, INT64_MAX)


def _check_ints(name: str, values: _Ints, low: int, high: int) -> _Ints:
    check_isinstance(name, values, (list, tuple), allow_none=False)
    for i, value in enumerate(values):
        # The message is built only for the offender: these lists have thousands of elements.
        if not isinstance(value, int) or not low <= value <= high:
            _check_int(f"{name}[{i}]", value, low, high)
    return _with_ints(values)


def check_list_int32(name: str, values: _Ints) -> _Ints:
    """Returns `values` if it is a list or tuple of int32 (TypeError, ValueError otherwise)."""
    return _check_ints(name, values, INT32_MIN, INT32_MAX)


def check_list_int64(name: str, values: _Ints) -> _Ints:
    """Returns `values` if it is a list or tuple of int64 (TypeError, ValueError otherwise)."""
    return _check_ints(name, values, INT64_MIN, INT64_MAX)


def check_list_uint64(name: str, values: _Ints) -> _Ints:
    """Returns `values` if it is a list or tuple of uint64 (TypeError, ValueError otherwise)."""
    return _check_ints(name, values, 0, UINT64_MAX)


def check_address(name: str, value: int) -> int:
    """Returns `value` if it is a uint64 and no bool: True is not an address.

    Raises:
        TypeError: not an int, or a bool.
        ValueError: outside uint64. Zero passes here; whether it may be given is the caller's rule.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} only support int, but got bool {value!r}")
    return check_uint64(name, value)


def check_addresses(name: str, values: _Ints) -> _Ints:
    """Returns `values` if it is a list or tuple of addresses; see `check_address`."""
    check_isinstance(name, values, (list, tuple), allow_none=False)
    for i, value in enumerate(values):
        check_address(f"{name}[{i}]", value)
    return _with_ints(values)


def check_positive_or_set_default(name: str, v: int | None, default: int = -1) -> int:
    """Returns `v`, or `default` for None.

    Raises:
        TypeError: neither int nor None.
        ValueError: negative.
    """
    if v is None:
        return default
    v = check_isinstance(name, v, int)
    if v < 0:
        raise ValueError(f"{name}={shown(v)} must not be negative")
    return v


@overload
def check_layer_range(
    name: str,
    layer_range: range | None,
    *,
    allow_none: Literal[False] = ...,
    uint32_bounds: bool = ...,
    num_layers: int | None = ...,
) -> range: ...


@overload
def check_layer_range(
    name: str,
    layer_range: range | None,
    *,
    allow_none: bool,
    uint32_bounds: bool = ...,
    num_layers: int | None = ...,
) -> range | None: ...


def check_layer_range(
    name: str,
    layer_range: range | None,
    *,
    allow_none: bool = False,
    uint32_bounds: bool = False,
    num_layers: int | None = None,
) -> range | None:
    """Returns a range of layers if it names at least one layer, one after the other.

    Only `start`, `stop` and `step` are looked at, so a huge range costs nothing.

    Args:
        name: name of the argument, for the message.
        layer_range: layers `start .. stop-1`.
        allow_none: whether None passes.
        uint32_bounds: refuse bounds above uint32 with ValueError, as the pulls do (9.3).
        num_layers: number of layers there are; None does not look at it.

    Raises:
        TypeError: not a range.
        ValueError: a bound above uint32, where asked for.
        LLMParamError: step other than 1, negative, empty, or beyond `num_layers`.
    """
    if layer_range is None and allow_none:
        return None
    if not isinstance(layer_range, range):
        raise TypeError(f"{name} only support range, but got {type(layer_range).__name__}")
    if layer_range.step != 1:
        raise param_error(f"{name}={shown(layer_range)} has a step, only 1 is supported.")
    if layer_range.start < 0:
        raise param_error(f"{name}={shown(layer_range)} starts below 0.")
    if uint32_bounds:
        check_uint32(f"{name}.start", layer_range.start)
        check_uint32(f"{name}.stop", layer_range.stop)
    if layer_range.start >= layer_range.stop:
        raise param_error(
            f"{name}={shown(layer_range)} names no layer.",
            remedy="give start < stop, or leave it out",
        )
    if num_layers is not None and layer_range.stop > num_layers:
        raise param_error(f"{name}={shown(layer_range)} is out of range [0, {num_layers}).")
    return layer_range


def layer_count(layer_range: range) -> int:
    """Number of layers of a range with step 1; unlike `len()`, right for bounds of any size."""
    return max(0, layer_range.stop - layer_range.start)


def as_ids(ids: Ids, name: str = "ids") -> torch.Tensor:
    """Block ids as a tensor, converted once.

    Args:
        ids: A sequence of ints (NumPy's too), or a 1-D integer tensor on any device.
        name: What the caller calls them, for messages.

    Returns:
        int64 CPU tensor of shape [n], always a copy.

    Raises:
        TypeError: Not ints, or a tensor of another kind (bool and floating point are refused, not
            rounded).
        ValueError: A tensor that is not 1-D, or an id that does not fit in 64 bits.
    """
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got a tensor of {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got a tensor of shape {tuple(ids.shape)}")
        # A copy, so that nobody can change ids between their check and their use.
        if ids.numel() <= _IDS_AT_ONCE or ids.device.type != "cpu":
            return ids.to(device="cpu", dtype=torch.int64, copy=True)
        copied = torch.empty(ids.numel(), dtype=torch.int64)
        for at in range(0, ids.numel(), _IDS_AT_ONCE):
            copied[at : at + _IDS_AT_ONCE].copy_(ids[at : at + _IDS_AT_ONCE])
        return copied
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints or a tensor, got {type(ids).__name__}")
    # torch.tensor would round floats and take bools; a set of types costs little and catches both.
    kinds = set(map(type, ids))
    if kinds != _ONLY_INT:
        _check_id_types(ids, kinds, name)
    try:
        # An array converts a list three times as fast as torch.tensor does.
        values = array("q", ids)
    except OverflowError as error:
        at = next(i for i, value in enumerate(ids) if not -(2**63) <= value < 2**63)
        raise ValueError(f"{name}[{at}]={ids[at]} does not fit in 64 bits") from error
    return torch.frombuffer(values, dtype=torch.int64) if values else _NO_IDS.clone()


def _check_id_types(ids: Sequence[Any], kinds: set[type], name: str) -> None:
    wrong = {kind for kind in kinds if kind is bool or not issubclass(kind, Integral)}
    if wrong:
        at = next(i for i, value in enumerate(ids) if type(value) in wrong)
        raise TypeError(f"{name}[{at}]={ids[at]!r} is a {type(ids[at]).__name__}, expected int")

# SPDX-License-Identifier: Apache-2.0
"""The validators: what passes, what is raised, and that the message names the offender."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_datadist_torch.values import checks
from llm_datadist_torch.values.enums import (
    LLMRole,
    Memtype,
    Placement,
    PushType,
    RegisterMemStatus,
    int_to_mem_status_dict,
)
from llm_datadist_torch.values.status import LLMException, LLMParamError, LLMStatusCode

WIDTHS = {
    "check_uint8": (0, 2**8 - 1),
    "check_uint16": (0, 2**16 - 1),
    "check_uint32": (0, 2**32 - 1),
    "check_uint64": (0, 2**64 - 1),
    "check_int32": (-(2**31), 2**31 - 1),
    "check_int64": (-(2**63), 2**63 - 1),
}
LISTS = {
    "check_list_int32": WIDTHS["check_int32"],
    "check_list_int64": WIDTHS["check_int64"],
    "check_list_uint64": WIDTHS["check_uint64"],
    "check_addresses": WIDTHS["check_uint64"],
}
NO_INTS = [None, 1.0, "1", [1], np.float64(1), np.bool_(True), torch.tensor(1)]


def test_enumerations_are_the_reference_tables():
    assert {m.name: m.value for m in LLMRole} == {"PROMPT": 1, "DECODER": 2, "MIX": 3}
    assert {m.name: m.value for m in Placement} == {"HOST": 0, "DEVICE": 1}
    assert {m.name: m.value for m in Memtype} == {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}
    assert {m.name: m.value for m in RegisterMemStatus} == {"OK": 0, "PREPARING": 1, "FAILED": 2}
    assert {m.name: m.value for m in PushType} == {
        "NO_CACHE_KEY": 0,
        "BLOCKS_CACHE_KEY": 1,
        "CACHE_KEY_BY_ID": 2,
    }
    assert int_to_mem_status_dict == {
        0: RegisterMemStatus.OK,
        1: RegisterMemStatus.PREPARING,
        2: RegisterMemStatus.FAILED,
    }
    for member in (LLMRole.PROMPT, Placement.DEVICE, Memtype.MEM_TYPE_HOST, RegisterMemStatus.OK):
        assert str(member) == f"{member}" == f"{type(member).__name__}.{member.name}"


@pytest.mark.parametrize(
    ("value", "classes", "inner"),
    [
        (None, int, None),
        (True, int, None),
        (Placement.HOST, int, None),
        ([1, True], (list, tuple), int),
        (torch.Size([1, 2]), (list, tuple), int),
        ({1: "a"}, dict, int),
        ((), tuple, int),
    ],
)
def test_isinstance_passes_and_returns_the_value(value, classes, inner):
    assert checks.check_isinstance("x", value, classes, inner) is value


@pytest.mark.parametrize(
    ("value", "classes", "inner", "text"),
    [
        (1, str, None, "x only support str, but got int"),
        (1, (str, bytes), None, "x only support str or bytes, but got int"),
        (np.int64(1), str, None, "only support str"),
        (np.bool_(True), int, None, "only support int"),
        ([np.float32(1)], list, int, r"x\[0\] only support int"),
        ([1, "2"], list, int, r"x\[1\] only support int, but got str '2'"),
        ([1, None], list, int, r"x\[1\] only support int"),
        ({"a": 1}, dict, int, r"x\[0\] only support int"),
    ],
)
def test_isinstance_refuses(value, classes, inner, text):
    with pytest.raises(TypeError, match=text):
        checks.check_isinstance("x", value, classes, inner)


def test_isinstance_none_and_extra_text():
    with pytest.raises(TypeError, match=r"only support int, but got NoneType, \{sorry\}"):
        checks.check_isinstance("x", None, int, extra_fmt=", {sorry}", allow_none=False)


@pytest.mark.parametrize(
    ("value", "v_inner", "expected"),
    [
        (None, None, AttributeError),
        ([], None, TypeError),
        ({"a": [1]}, None, TypeError),
        ({1: (1,)}, None, TypeError),
        ({1: None}, None, TypeError),
        ({None: []}, None, TypeError),
        ({1: ["a"]}, int, TypeError),
        ({1: ["a"], 2: []}, None, None),
        ({}, int, None),
    ],
)
def test_dict(value, v_inner, expected):
    if expected is None:
        checks.check_dict("d", value, int, list, v_inner)
    else:
        with pytest.raises(expected, match="only support"):
            checks.check_dict("d", value, int, list, v_inner)


@pytest.mark.parametrize(("function", "bounds"), WIDTHS.items())
def test_widths(function, bounds):
    check = getattr(checks, function)
    for value in (*bounds, 0, True):
        assert check("x", value) is value
    for value in (bounds[0] - 1, bounds[1] + 1, 10**5000):
        with pytest.raises(ValueError, match=r"x=.*out of range \["):
            check("x", value)
    for value in NO_INTS:
        with pytest.raises(TypeError, match="x only support int"):
            check("x", value)


@pytest.mark.parametrize(("function", "bounds"), LISTS.items())
@pytest.mark.parametrize("container", [list, tuple])
def test_lists(function, bounds, container):
    check = getattr(checks, function)
    for values in (container(), container(bounds)):
        assert check("x", values) is values
    for value in (bounds[0] - 1, bounds[1] + 1):
        with pytest.raises(ValueError, match=r"x\[2\]=.*out of range \["):
            check("x", container([0, 1, value]))
    for value in NO_INTS:
        with pytest.raises(TypeError, match=r"x\[1\] only support int"):
            check("x", container([0, value]))
    for values in (None, {1}, "1", range(3), 1):
        with pytest.raises(TypeError, match="x only support list or tuple"):
            check("x", values)


def test_a_bool_is_an_int_but_no_address():
    assert checks.check_list_uint64("x", [True]) == [True]
    with pytest.raises(TypeError, match=r"x\[1\] only support int, but got bool"):
        checks.check_addresses("x", [1, True])
    with pytest.raises(TypeError, match="bool"):
        checks.check_address("x", False)
    assert checks.check_address("x", 0) == 0


def test_positive_or_default():
    assert checks.check_positive_or_set_default("x", None) == -1
    assert checks.check_positive_or_set_default("x", None, 5) == 5
    assert checks.check_positive_or_set_default("x", 0, 5) == 0
    with pytest.raises(ValueError, match="x=-1"):
        checks.check_positive_or_set_default("x", -1)
    with pytest.raises(TypeError, match="only support int"):
        checks.check_positive_or_set_default("x", "1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (range(0, 4, 2), "step"),
        (range(4, 0, -1), "step"),
        (range(-1, 4), "below 0"),
        (range(0), "no layer"),
        (range(3, 3), "no layer"),
        (range(3, 1), "no layer"),
        pytest.param(range(-(10**5000), 0), "below 0", id="long"),
    ],
)
@pytest.mark.parametrize("uint32_bounds", [False, True])
def test_bad_layer_ranges(value, text, uint32_bounds):
    with pytest.raises(LLMParamError, match=f"x=.*{text}") as caught:
        checks.check_layer_range("x", value, uint32_bounds=uint32_bounds)
    assert isinstance(caught.value, LLMException)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("value", [None, [0], 3, slice(0, 3), "range(0, 3)"])
def test_what_is_no_range(value):
    with pytest.raises(TypeError, match="x only support range"):
        checks.check_layer_range("x", value)


def test_good_layer_ranges():
    assert checks.check_layer_range("x", None, allow_none=True) is None
    value = range(1, 3)
    assert checks.check_layer_range("x", value, num_layers=3) is value
    with pytest.raises(LLMParamError, match=r"range\(1, 3\) is out of range \[0, 2\)"):
        checks.check_layer_range("x", value, num_layers=2)


def test_huge_layer_ranges_are_not_expanded():
    huge = range(2**80)
    assert checks.check_layer_range("x", huge) is huge
    assert checks.layer_count(huge) == 2**80
    with pytest.raises(ValueError, match=r"x\.stop") as caught:
        checks.check_layer_range("x", huge, uint32_bounds=True)
    assert not isinstance(caught.value, LLMException)
    with pytest.raises(LLMParamError, match="out of range"):
        checks.check_layer_range("x", huge, num_layers=4)
    assert checks.layer_count(range(3, 1)) == 0

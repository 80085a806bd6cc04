# SPDX-License-Identifier: Apache-2.0
"""The cases of the simulator's kernels of single elements, and of those that make tensors."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.kernel_inputs import (
    ALL,
    BOOL,
    CASTS,
    COMPLEX,
    FLOATS,
    INTEGERS,
    NUMBERS,
    SINGLE,
    Case,
    Inputs,
    changed,
)


def _unary_cases() -> list[Case]:
    of_unit = [
        "acos",
        "asin",
        "atan",
        "atanh",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "frac",
        "log",
        "log10",
        "log1p",
        "log2",
        "reciprocal",
        "rsqrt",
        "sqrt",
        "sigmoid",
        "sin",
        "sinc",
        "sinh",
        "cos",
        "cosh",
        "tan",
        "tanh",
        "asinh",
    ]
    cases = [Case(name, lambda i, n=name: getattr(torch, n)(i.unit)) for name in of_unit]
    of_any = ("ceil", "floor", "round", "trunc")
    of_any += ("isnan", "isinf", "isfinite", "isposinf", "isneginf")
    cases += [Case(name, lambda i, n=name: getattr(torch, n)(i.x / 2 + 0.3)) for name in of_any]
    cases += [Case(name, lambda i, n=name: getattr(torch, n)(i.x), NUMBERS) for name in ("sign",)]
    cases += [
        Case("abs", lambda i: i.x.abs(), NUMBERS),
        Case("neg", lambda i: i.x.neg(), NUMBERS),
        Case("acosh", lambda i: (i.unit + 1).acosh(), SINGLE),
        Case("bitwise_not", lambda i: ~i.x, INTEGERS + BOOL),
        Case("logical_not", lambda i: i.x.logical_not(), NUMBERS + BOOL),
        Case("square", lambda i: i.x.square()),
        Case("sqrt_", lambda i: changed(i.unit, torch.Tensor.sqrt_)),
        Case("exp_", lambda i: changed(i.unit, torch.Tensor.exp_)),
        Case("tanh_", lambda i: changed(i.unit, torch.Tensor.tanh_)),
        Case("relu_", lambda i: changed(i.x, torch.Tensor.relu_)),
        Case("round decimals", lambda i: i.unit.round(decimals=1), SINGLE),
        Case("nan_to_num", lambda i: (i.x / 0 * 0 + i.x).nan_to_num(nan=3.5), SINGLE),
        Case("signbit", lambda i: i.x.signbit(), SINGLE),
        Case("conj mul", lambda i: i.x.conj() * i.y, COMPLEX),
    ]
    layers = ("silu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "relu", "leaky_relu")
    for name in (*layers, "elu", "softplus"):
        cases.append(Case(name, lambda i, n=name: getattr(functional, n)(i.x / 3)))
    return cases + _activation_cases()


def _activation_cases() -> list[Case]:
    return [
        Case("gelu", lambda i: functional.gelu(i.x / 3)),
        Case("hardtanh", lambda i: functional.hardtanh(i.x, -1.5, 2.5)),
        Case("threshold", lambda i: functional.threshold(i.x, 1.0, 20.0)),
        Case("glu", lambda i: functional.glu(i.x / 3)),
    ]


def _arithmetic_cases() -> list[Case]:
    tensor = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "add alpha": lambda a, b: torch.add(a, b, alpha=3),
        "sub alpha": lambda a, b: torch.sub(a, b, alpha=2),
        "floor_divide": lambda a, b: a // b,
        "div trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
        "div floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
        "remainder": lambda a, b: a % b,
        "fmod": torch.fmod,
        "maximum": lambda a, b: torch.maximum(a, torch.as_tensor(b).to(a).expand_as(a)),
        "rsub": lambda a, b: torch.rsub(a, b),
    }
    cases = []
    for name, function in tensor.items():
        cases += [
            Case(f"{name} tensor", lambda i, f=function: f(i.x, i.y), NUMBERS),
            Case(f"{name} broadcast", lambda i, f=function: f(i.x, i.row), NUMBERS),
            Case(f"{name} number", lambda i, f=function: f(i.x, 3), NUMBERS),
        ]
    cases += [
        Case("add other type", lambda i: i.x + i.y.to(torch.float32), NUMBERS),
        Case("add float number", lambda i: i.x + 2.5, NUMBERS),
        Case("add 0-d", lambda i: i.x + i.make(torch.tensor(2)), NUMBERS),
        Case("number minus", lambda i: 7 - i.x, NUMBERS),
        Case("number over", lambda i: 7 / i.y, NUMBERS),
        Case("number mod", lambda i: 7 % i.y, INTEGERS),
        Case("pow number", lambda i: i.x**2, FLOATS),
        Case("pow half", lambda i: i.unit**0.5),
        Case("pow tensor", lambda i: i.y**i.row, SINGLE),
        Case("number pow", lambda i: 2.0**i.x, SINGLE),
        Case("add complex", lambda i: i.x + i.y * 2j, COMPLEX),
        Case("addcmul", lambda i: torch.addcmul(i.x, i.y, i.row, value=2)),
        Case("addcdiv", lambda i: torch.addcdiv(i.x, i.x, i.y, value=2)),
        Case("lerp", lambda i: torch.lerp(i.x, i.y, 0.25)),
        Case("lerp_", lambda i: changed(i.x, lambda t: t.lerp_(i.y, 0.25))),
        Case("lerp_ tensor", lambda i: changed(i.x, lambda t: t.lerp_(i.y, i.unit))),
        Case("logaddexp", lambda i: torch.logaddexp(i.x, i.y), SINGLE),
        Case("lerp tensor", lambda i: torch.lerp(i.x, i.y, i.unit)),
        Case("atan2", lambda i: torch.atan2(i.x, i.y)),
        Case("clamp", lambda i: i.x.clamp(-1, 4), NUMBERS),
        Case("clamp min", lambda i: i.x.clamp(min=2), NUMBERS),
        Case("clamp max", lambda i: i.x.clamp(max=2), NUMBERS),
        Case("clamp tensor", lambda i: i.x.clamp(i.y - 2, i.y), SINGLE),
        Case("minimum", lambda i: torch.minimum(i.x, i.y), NUMBERS),
        Case("where", lambda i: torch.where(i.mask, i.x, i.y), ALL),
        Case("where number", lambda i: torch.where(i.mask, i.x, 5), NUMBERS),
    ]
    for name in ("add_", "sub_", "mul_", "div_"):
        cases += [
            Case(name, lambda i, n=name: changed(i.x, lambda t: getattr(t, n)(i.y))),
            Case(f"{name} number", lambda i, n=name: changed(i.x, lambda t: getattr(t, n)(3))),
        ]
    cases.append(Case("clamp_", lambda i: changed(i.x, lambda t: t.clamp_(-1, 4)), NUMBERS))
    return cases


def _comparison_cases() -> list[Case]:
    cases = []
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        cases += [
            Case(name, lambda i, n=name: getattr(i.x, n)(i.y), ALL),
            Case(f"{name} number", lambda i, n=name: getattr(i.x, n)(3), NUMBERS),
        ]
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        cases += [
            Case(name, lambda i, n=name: getattr(i.x, n)(i.y), INTEGERS + BOOL),
            Case(f"{name} number", lambda i, n=name: getattr(i.x, n)(5), INTEGERS),
        ]
    for name in ("logical_and", "logical_or", "logical_xor"):
        cases.append(Case(name, lambda i, n=name: getattr(i.x, n)(i.mask), NUMBERS + BOOL))
    shift = (torch.int64, torch.int32)
    cases += [
        Case("all", lambda i: i.mask.all(), SINGLE),
        Case("all dim", lambda i: i.mask.all(1), SINGLE),
        Case("all of numbers", lambda i: i.y.all(), INTEGERS),
        Case("any", lambda i: i.mask.any(), SINGLE),
        Case("any dim", lambda i: i.mask.any(0, keepdim=True), SINGLE),
        Case("equal same", lambda i: torch.equal(i.x, i.x.clone()), ALL),
        Case("equal other", lambda i: torch.equal(i.x, i.y), ALL),
        Case("allclose", lambda i: torch.allclose(i.x, i.x + 1e-6), SINGLE),
        Case("isclose", lambda i: torch.isclose(i.x, i.y, rtol=0.3, atol=0.5), SINGLE),
        Case("shift", lambda i: (i.y << 2, i.y >> 1), shift),
        Case("isin", lambda i: torch.isin(i.x, i.index(1, 3, 5).to(i.dtype)), INTEGERS[:2]),
        Case("eq_", lambda i: changed(i.x, lambda t: t.eq_(i.y)), SINGLE),
    ]
    return cases


def _creation_cases() -> list[Case]:
    def every_cast(i: Inputs) -> list[torch.Tensor]:
        return [i.x.abs().to(dtype) for dtype in CASTS]

    same = {"layouts": ("contiguous",)}
    return [
        Case("clone", lambda i: i.x.clone(), ALL + COMPLEX),
        Case("contiguous", lambda i: i.x.contiguous(), ALL + COMPLEX),
        Case("transpose contiguous", lambda i: i.x.T.contiguous(), ALL + COMPLEX),
        Case("casts", every_cast, (*NUMBERS, torch.float64)),
        Case("cast bool", lambda i: [i.mask.to(dtype) for dtype in CASTS], SINGLE),
        Case("copy_", lambda i: changed(i.x, lambda t: t.copy_(i.y)), ALL),
        Case("copy_ row", lambda i: changed(i.x, lambda t: t.copy_(i.row)), ALL),
        Case("copy_ other type", lambda i: changed(i.x, lambda t: t.copy_(i.y.float())), NUMBERS),
        Case(
            "copy into part", lambda i: changed(i.x, lambda t: t[1:3, 2:].copy_(i.y[:2, :4])), ALL
        ),
        Case("from host", lambda i: changed(i.x, lambda t: t.copy_(torch.ones(4, 6))), ALL),
        Case("assign part", lambda i: changed(i.x, lambda t: t.__setitem__((1, 2), 3)), NUMBERS),
        Case("zero_", lambda i: changed(i.x, torch.Tensor.zero_), ALL),
        Case("fill_", lambda i: changed(i.x, lambda t: t.fill_(1)), ALL),
        Case("fill_ part", lambda i: changed(i.x, lambda t: t[:, 1::2].fill_(1)), ALL),
        Case("fill_ tensor", lambda i: changed(i.x, lambda t: t.fill_(i.y[0, 0])), NUMBERS),
        Case("zeros", lambda i: torch.zeros(3, 5, **i.options), ALL, **same),
        Case("ones", lambda i: torch.ones(3, 5, **i.options), ALL, **same),
        Case("full", lambda i: torch.full((3, 5), 2, **i.options), NUMBERS, **same),
        Case("zeros_like", lambda i: torch.zeros_like(i.x), ALL),
        Case("arange", lambda i: torch.arange(1, 20, 3, **i.options), NUMBERS, **same),
        Case("arange step", lambda i: torch.arange(0, 2, 0.25, **i.options), FLOATS, **same),
        Case("linspace", lambda i: torch.linspace(-1, 2, 7, **i.options), SINGLE, **same),
        Case("logspace", lambda i: torch.logspace(0, 2, 5, **i.options), SINGLE, **same),
        Case("eye", lambda i: torch.eye(3, 5, **i.options), FLOATS, **same),
    ]


def _joined_cases() -> list[Case]:
    return [
        Case("cat", lambda i: torch.cat([i.x, i.y, i.x[:1]]), ALL),
        Case("cat dim", lambda i: torch.cat([i.x, i.y[:, :2]], dim=1), ALL),
        Case("cat empty", lambda i: torch.cat([i.x[:0], i.y]), SINGLE),
        Case("stack", lambda i: torch.stack([i.x, i.y], dim=1), ALL),
        Case("repeat", lambda i: i.x.repeat(2, 3), ALL),
        Case("tile", lambda i: i.row.tile(3), NUMBERS),
        Case("expand", lambda i: i.row.expand(3, -1).contiguous(), ALL),
        Case("repeat_interleave", lambda i: i.x.repeat_interleave(2, dim=1), NUMBERS),
        Case(
            "repeat_interleave tensor",
            lambda i: i.x.repeat_interleave(i.index(1, 0, 3, 2), dim=0),
            SINGLE,
        ),
        Case(
            "repeat_interleave index",
            lambda i: i.index(1, 0, 3).repeat_interleave(i.index(2, 0, 1)),
            SINGLE,
        ),
        Case("repr", lambda i: repr(i.x).replace(", device='npu:0'", ""), ALL),
        Case("flip", lambda i: i.x.flip(0, 1), ALL),
        Case("roll", lambda i: i.x.roll((1, 2), (0, 1)), NUMBERS),
        Case("tril", lambda i: i.x.tril(1), NUMBERS),
        Case("triu", lambda i: i.x.triu(-1), NUMBERS),
        Case("triu bool", lambda i: torch.ones(4, 4, device=i.device).bool().triu(1), SINGLE),
        Case("pad", lambda i: functional.pad(i.x, (1, 2, 0, 1), value=7), NUMBERS),
        Case("one_hot", lambda i: functional.one_hot(i.index(2, 0, 1), 4), SINGLE),
        Case("split", lambda i: i.x.split([1, 2, 3], dim=1), ALL),
        Case("unfold", lambda i: i.x.unfold(1, 2, 2).contiguous(), SINGLE),
        Case("empty", lambda i: (i.x[:0] + 1, i.x[:, :0].sum()), SINGLE),
        Case("0-d", lambda i: i.make(torch.tensor(5)) * 2, NUMBERS),
        Case("complex", lambda i: torch.complex(i.x, i.y), SINGLE),
        Case("polar parts", lambda i: (i.x.real + 1, i.x.imag * 2), COMPLEX),
    ]


def cases() -> list[Case]:
    """Returns the cases of this file."""
    return [
        *_unary_cases(),
        *_arithmetic_cases(),
        *_comparison_cases(),
        *_creation_cases(),
        *_joined_cases(),
    ]

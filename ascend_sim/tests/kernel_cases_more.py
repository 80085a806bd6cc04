# SPDX-License-Identifier: Apache-2.0
"""The cases of the simulator's larger kernels: indices, reductions, order, products, layers."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.kernel_inputs import (
    ALL,
    FLOATS,
    INTEGERS,
    NUMBERS,
    SINGLE,
    Case,
    Inputs,
    changed,
)


def _index_cases() -> list[Case]:
    ids = (3, 0, 2)
    return [
        Case("index rows", lambda i: i.x[i.index(*ids)], ALL),
        Case("index columns", lambda i: i.x[:, i.index(*ids)], ALL),
        Case("index both", lambda i: i.x[i.index(*ids), i.index(5, 0, 1)], ALL),
        Case("index negative", lambda i: i.x[i.index(-1, -4)], NUMBERS),
        Case("index mask", lambda i: i.x[i.mask], ALL),
        Case("index int32", lambda i: i.x[i.index(*ids, dtype=torch.int32)], SINGLE),
        Case("index 2-d", lambda i: i.x[i.index(3, 0, 2, 1).reshape(2, 2)], NUMBERS),
        Case("index empty", lambda i: (i.x[i.index()], i.x[:, i.index()]), ALL),
        Case("index_put_ empty", lambda i: _set(i.x, (slice(None), i.index()), 1), ALL),
        Case("index_put_ no mask", lambda i: _set(i.x, i.x != i.x, 1), ALL),
        Case("index_select", lambda i: i.x.index_select(0, i.index(*ids)), ALL),
        Case("index_select columns", lambda i: i.x.index_select(1, i.index(*ids)), ALL),
        Case("gather", lambda i: i.x.gather(1, i.index(3, 0, 2, 1).reshape(4, 1)), ALL),
        Case("take", lambda i: i.x.take(i.index(7, 0, 23)), NUMBERS),
        Case("take_along_dim", lambda i: i.x.take_along_dim(i.x.argsort(1), 1), SINGLE),
        Case("masked_select", lambda i: i.x.masked_select(i.mask), ALL),
        Case("nonzero", lambda i: i.mask.nonzero(), SINGLE),
        Case("nonzero numbers", lambda i: i.x.nonzero(), NUMBERS),
        Case("nonzero tuple", lambda i: i.mask.nonzero(as_tuple=True), SINGLE),
        Case("masked_fill", lambda i: i.x.masked_fill(i.mask, 1), ALL),
        Case("masked_fill_ inf", lambda i: i.x.masked_fill_(i.mask, float("-inf"))),
        Case("masked_fill tensor", lambda i: i.x.masked_fill(i.mask, i.y[0, 0]), NUMBERS),
        Case("masked_scatter", lambda i: i.x.masked_scatter(i.mask, i.y), NUMBERS),
        Case("index_fill", lambda i: i.x.index_fill(1, i.index(*ids), 9), NUMBERS),
        Case("index_fill_", lambda i: changed(i.x, lambda t: t.index_fill_(0, i.index(1), 9))),
        Case("index_copy", lambda i: i.x.index_copy(0, i.index(*ids), i.y[:3]), ALL),
        Case(
            "index_copy_",
            lambda i: changed(i.x, lambda t: t.index_copy_(0, i.index(*ids), i.y[:3])),
            ALL,
        ),
        Case(
            "index_copy_ columns",
            lambda i: changed(i.x, lambda t: t.index_copy_(1, i.index(*ids), i.y[:, :3])),
            NUMBERS,
        ),
        Case("index_add", lambda i: i.x.index_add(0, i.index(1, 1, 3), i.y[:3]), NUMBERS),
        Case("index_put_", lambda i: i.x.index_put_((i.index(*ids),), i.y[:3]), ALL),
        Case(
            "index_put_ both", lambda i: i.x.index_put_((i.index(1, 2), i.index(0, 5)), i.y[0, :2])
        ),
        Case(
            "index_put_ accumulate",
            lambda i: i.x.index_put_((i.index(1, 1),), i.y[:2], accumulate=True),
            NUMBERS,
        ),
        Case("index_put_ columns", lambda i: _set(i.x, (slice(None), i.index(*ids)), i.y[:, :3])),
        Case("index_put_ mask", lambda i: _set(i.x, i.mask, 2), NUMBERS),
        Case("scatter", lambda i: i.x.scatter(0, _rows(i), i.y[:2]), ALL),
        Case("scatter number", lambda i: i.x.scatter(0, _rows(i), 5), NUMBERS),
        Case("scatter_", lambda i: i.x.scatter_(0, _rows(i), i.y[:2]), NUMBERS),
        Case("scatter_add", lambda i: i.x.scatter_add(0, _rows(i), i.y[:2]), NUMBERS),
        Case("scatter add", lambda i: i.x.scatter(0, _rows(i), i.y[:2], reduce="add"), SINGLE),
        Case("put_", lambda i: i.x.put_(i.index(7, 0), i.y[0, :2]), SINGLE),
        Case("embedding", lambda i: functional.embedding(i.index(3, 1, 1), i.x)),
        Case("slice step", lambda i: i.x[1::2, ::3] + 1, NUMBERS),
    ]


def _set(tensor: torch.Tensor, where: object, value: object) -> torch.Tensor:
    tensor[where] = value  # type: ignore[index]
    return tensor


def _rows(i: Inputs) -> torch.Tensor:
    return i.index(3, 0, 1, 2, 1, 0, 1, 2, 3, 0, 2, 3).reshape(2, 6)


def _reduction_cases() -> list[Case]:
    cases = []
    for name in ("sum", "mean", "prod", "amax", "amin"):
        dtypes = FLOATS if name == "mean" else NUMBERS
        source = (lambda i: i.y[:, :3]) if name == "prod" else (lambda i: i.x)
        cases += [
            Case(name, lambda i, n=name, s=source: getattr(s(i), n)(), dtypes),
            Case(f"{name} dim", lambda i, n=name, s=source: getattr(s(i), n)(1), dtypes),
            Case(f"{name} keep", lambda i, n=name, s=source: getattr(s(i), n)(0, True), dtypes),
        ]
    return [
        *cases,
        Case("sum bool", lambda i: i.mask.sum(), SINGLE),
        Case("sum dims", lambda i: i.x.sum((0, 1), keepdim=True), NUMBERS),
        Case("sum dtype", lambda i: i.x.sum(dtype=torch.float32), NUMBERS),
        Case("max", lambda i: i.x.max(), NUMBERS),
        Case("min", lambda i: i.x.min(), NUMBERS),
        Case("max dim", lambda i: i.numbers(3, 3).max(1).values, NUMBERS),
        Case("min dim", lambda i: _distinct(i).min(1), FLOATS),
        Case("argmax", lambda i: _distinct(i).argmax(), FLOATS),
        Case("argmax dim", lambda i: _distinct(i).argmax(1), FLOATS),
        Case("argmin keep", lambda i: _distinct(i).argmin(0, keepdim=True), FLOATS),
        Case("aminmax", lambda i: i.x.aminmax(), SINGLE),
        Case("aminmax dim", lambda i: i.x.aminmax(dim=1), SINGLE),
        Case("var", lambda i: i.x.var(), SINGLE),
        Case("var dim", lambda i: i.x.var(1, correction=0, keepdim=True)),
        Case("std", lambda i: i.x.std(0), SINGLE),
        Case("var_mean", lambda i: torch.var_mean(i.x, 1), SINGLE),
        Case("norm", lambda i: i.x.norm(), SINGLE),
        Case("norm dim", lambda i: i.x.norm(p=1, dim=1), SINGLE),
        Case("vector_norm", lambda i: torch.linalg.vector_norm(i.x, dim=0), SINGLE),
        Case("logsumexp", lambda i: i.x.logsumexp(1)),
        Case("cumsum", lambda i: i.x.cumsum(1), (torch.float32, *INTEGERS[:2])),
        Case("cumprod", lambda i: i.y[:, :3].cumprod(1), SINGLE),
        Case("cummax", lambda i: _distinct(i).cummax(1), SINGLE),
        Case("median", lambda i: _distinct(i).median(), SINGLE),
        Case("kthvalue", lambda i: _distinct(i).kthvalue(2, 1), SINGLE),
        Case("bincount", lambda i: i.index(1, 3, 1, 0).bincount(minlength=6), SINGLE),
        Case("trace", lambda i: i.x.trace(), SINGLE),
    ]


def _order_cases() -> list[Case]:
    unique = {"layouts": ("contiguous",)}
    return [
        Case("sort", lambda i: _distinct(i).sort(1), FLOATS),
        Case("sort stable", lambda i: i.x.sort(dim=1, descending=True, stable=True), NUMBERS),
        Case("argsort", lambda i: _distinct(i).argsort(0), FLOATS),
        Case("topk", lambda i: _distinct(i).topk(3, 1), FLOATS),
        Case("topk smallest", lambda i: _distinct(i).topk(2, 0, largest=False), FLOATS),
        Case("unique", lambda i: i.x.unique(), (torch.float32, *INTEGERS), **unique),
        Case(
            "unique counts",
            lambda i: i.x.unique(return_inverse=True, return_counts=True),
            (torch.float32, torch.int64),
            **unique,
        ),
        Case(
            "unique_consecutive",
            lambda i: i.index(1, 1, 2, 2, 2, 1).unique_consecutive(return_counts=True),
            SINGLE,
        ),
        Case(
            "searchsorted", lambda i: torch.searchsorted(i.index(1, 3, 5, 9), i.index(4, 9)), SINGLE
        ),
        Case(
            "bucketize", lambda i: torch.bucketize(i.unit, i.make(torch.tensor([0.2, 0.6]))), SINGLE
        ),
    ]


def _distinct(i: Inputs) -> torch.Tensor:
    return i.make((torch.arange(24) * 7 % 24).reshape(4, 6))


def _product_cases() -> list[Case]:
    return [
        Case("mm", lambda i: i.x @ i.y.T),
        Case("matmul 3-d", lambda i: i.numbers(2, 3, 4) @ i.numbers(4, 5)),
        Case("bmm", lambda i: torch.bmm(i.numbers(2, 3, 4), i.numbers(2, 4, 5))),
        Case("mv", lambda i: i.x @ i.row),
        Case("dot", lambda i: i.row @ i.x[0], SINGLE),
        Case("matmul 4-d", lambda i: i.numbers(2, 2, 3, 4) @ i.numbers(2, 2, 4, 3)),
        Case("addmm", lambda i: torch.addmm(i.x[:, :4], i.x, i.y.T, beta=2, alpha=0.5)),
        Case(
            "baddbmm",
            lambda i: torch.baddbmm(i.numbers(2, 3, 5), i.numbers(2, 3, 4), i.numbers(2, 4, 5)),
        ),
        Case("linear", lambda i: functional.linear(i.x, i.y, i.numbers(4))),
        Case("linear no bias", lambda i: functional.linear(i.numbers(2, 3, 6), i.y)),
        Case("einsum", lambda i: torch.einsum("ij,kj->ik", i.x, i.y), SINGLE),
        Case("outer", lambda i: torch.outer(i.row, i.x[0]), SINGLE),
        Case("addmv", lambda i: torch.addmv(i.x[:, 0], i.x, i.row, beta=2, alpha=0.5), SINGLE),
    ]


def _layer_cases() -> list[Case]:
    def attention(i: Inputs, **options: object) -> torch.Tensor:
        q, k, v = (i.numbers(2, 3, 5, 8, start=s, modulo=7) / 8 for s in (1, 2, 3))
        return functional.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    def masked_attention(i: Inputs) -> torch.Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool, device=i.device).tril()
        return attention(i, attn_mask=mask.expand(2, 1, 5, 5))

    def grouped_attention(i: Inputs) -> torch.Tensor:
        q = i.numbers(1, 4, 2, 8, modulo=7) / 8
        k, v = (i.numbers(1, 2, 5, 8, start=s, modulo=7) / 8 for s in (2, 3))
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def rms(i: Inputs) -> torch.Tensor:
        wide = i.x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return i.row * wide.to(i.dtype)

    def rotate(i: Inputs) -> torch.Tensor:
        half = torch.cat((-i.x[..., 3:], i.x[..., :3]), dim=-1)
        return i.x * i.unit.cos() + half * i.unit.sin()

    return [
        Case("softmax", lambda i: i.x.softmax(1)),
        Case("softmax float", lambda i: functional.softmax(i.x, -1, dtype=torch.float32)),
        Case("log_softmax", lambda i: i.x.log_softmax(0)),
        Case("layer_norm", lambda i: functional.layer_norm(i.x, (6,), i.row, i.row)),
        Case("layer_norm plain", lambda i: functional.layer_norm(i.x, (6,))),
        Case("rms_norm parts", rms),
        Case("rms_norm", lambda i: functional.rms_norm(i.x, (6,), i.row, 1e-6)),
        Case("rotary parts", rotate),
        Case("attention", attention),
        Case("attention causal", lambda i: attention(i, is_causal=True)),
        Case("attention mask", masked_attention),
        Case("attention scale", lambda i: attention(i, scale=0.3)),
        Case("attention grouped", grouped_attention),
        Case("dropout off", lambda i: functional.dropout(i.x, 0.5, training=False)),
        Case("cross_entropy", lambda i: functional.cross_entropy(i.x, i.index(2, 0, 5, 1)), SINGLE),
        Case(
            "nll_loss",
            lambda i: functional.nll_loss(i.x, i.index(2, 0, 5, 1), reduction="sum"),
            SINGLE,
        ),
    ]


def cases() -> list[Case]:
    """Returns the cases of this file."""
    return [
        *_index_cases(),
        *_reduction_cases(),
        *_order_cases(),
        *_product_cases(),
        *_layer_cases(),
    ]

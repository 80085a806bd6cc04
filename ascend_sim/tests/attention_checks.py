# SPDX-License-Identifier: Apache-2.0
"""Runs under the simulator: fused attention for inference, against plain torch.

Shapes are random, from a fixed seed; the reference computes one query and head after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch_npu

from tests.inference_inputs import DEVICE, HALF, close, generator

# Whether a query sees a key, by their numbers in the request.
Sees = Callable[[int, int], bool]


@dataclass
class Request:
    """Queries [query, head, element], keys and values [key, key head, element]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def attend(self, scale: float, sees: Sees) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the logarithms of the sums, one query and head after the other."""
        queries, heads, _ = self.query.shape
        shared = heads // self.key.shape[1]
        result = torch.zeros(queries, heads, self.value.shape[-1])
        sums = torch.full((queries, heads, 1), torch.inf)
        for token in range(queries):
            seen = [place for place in range(len(self.key)) if sees(token, place)]
            if not seen:
                continue
            for head in range(heads):
                keys, values = (t[seen, head // shared].float() for t in (self.key, self.value))
                scores = keys @ self.query[token, head].float() * scale
                result[token, head] = scores.softmax(0) @ values
                sums[token, head, 0] = scores.logsumexp(0)
        return result.to(self.query.dtype), sums


def causal(request: Request) -> Sees:
    """A query sees the keys up to its own; the last query's own is the last."""
    shift = len(request.key) - len(request.query)
    return lambda token, place: place <= token + shift


def window(request: Request, left: int) -> Sees:
    shift = len(request.key) - len(request.query)
    return lambda token, place: token + shift - left <= place <= token + shift


def sums_up(counts: list[int]) -> list[int]:
    return torch.tensor(counts).cumsum(0).tolist()


def paged(
    rows: list[torch.Tensor], block_size: int, choose: random.Random
) -> tuple[torch.Tensor, list[list[int]]]:
    """Puts tokens of [token, ...] into blocks in a random order; says which."""
    needed = [-(-len(row) // block_size) for row in rows]
    free = list(range(sum(needed) + 2))
    choose.shuffle(free)
    cache = torch.full((len(free), block_size, *rows[0].shape[1:]), 7.0).to(rows[0].dtype)
    table = []
    for row, count in zip(rows, needed, strict=True):
        blocks = [free.pop() for _ in range(count)]
        for place in range(len(row)):
            cache[blocks[place // block_size], place % block_size] = row[place]
        table.append(blocks)
    return cache, table


def padded(table: list[list[int]]) -> torch.Tensor:
    """A table of blocks as a tensor, with numbers of no block behind the end of a request."""
    columns = max(map(len, table))
    return torch.tensor(
        [[*row, *[9999] * (columns - len(row))] for row in table], dtype=torch.int32
    )


def some_requests(
    choose: random.Random,
    dtype: torch.dtype,
    widths: tuple[int, int],
    heads: tuple[int, int],
    one_query: bool = False,
) -> list[Request]:
    found = []
    for _ in range(choose.randint(1, 4)):
        queries = 1 if one_query else choose.randint(1, 6)
        keys = queries + choose.randint(0, 11)
        found.append(
            Request(
                torch.randn(queries, heads[0], widths[0]).to(dtype),
                torch.randn(keys, heads[1], widths[0]).to(dtype),
                torch.randn(keys, heads[1], widths[1]).to(dtype),
            )
        )
    return found


MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def fused(*tensors: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, with tensors of the host put on the device."""
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    return torch_npu.npu_fused_infer_attention_score(*(t.to(DEVICE) for t in tensors), **moved)


def check_fused_attention_of_packed_requests():
    choose = generator(4)
    for dtype in HALF:
        for key_heads, shared, value_width in ((1, 1, 8), (2, 3, 8), (2, 1, 4)):
            heads = key_heads * shared
            all_requests = some_requests(choose, dtype, (8, value_width), (heads, key_heads))
            options = {
                "input_layout": "TND",
                "num_heads": heads,
                "num_key_value_heads": key_heads,
                "scale": 0.3,
                "actual_seq_lengths": sums_up([len(r.query) for r in all_requests]),
                "actual_seq_lengths_kv": sums_up([len(r.key) for r in all_requests]),
                "softmax_lse_flag": True,
            }
            tensors = [
                torch.cat([getattr(r, n) for r in all_requests]) for n in ("query", "key", "value")
            ]
            masked = {"atten_mask": MASK}
            modes: list[
                tuple[dict[str, object], Callable[[Request], Callable[[int, int], bool]]]
            ] = [
                ({"sparse_mode": 0}, lambda r: lambda t, p: True),
                ({"sparse_mode": 2, **masked}, lambda r: lambda t, p: p <= t),
                ({"sparse_mode": 3, **masked}, causal),
                (
                    {"sparse_mode": 4, "pre_tokens": 2, "next_tokens": 0, **masked},
                    lambda r: window(r, 2),
                ),
            ]
            for mode, sees in modes:
                result, sums = fused(*tensors, **options, **mode)
                expected = [r.attend(0.3, sees(r)) for r in all_requests]
                close(result, torch.cat([e[0] for e in expected]))
                close(sums, torch.cat([e[1] for e in expected]))


def check_fused_attention_over_the_blocks_of_a_cache():
    choose = generator(5)
    for dtype in HALF:
        for heads_inside in (False, True):
            all_requests = some_requests(choose, dtype, (8, 8), (4, 2))
            keys, table = paged([r.key for r in all_requests], 128, choose)
            values, _ = keys.clone(), None
            for r, blocks in zip(all_requests, table, strict=True):
                for place in range(len(r.value)):
                    values[blocks[place // 128], place % 128] = r.value[place]
            if heads_inside:
                keys, values = (
                    keys.transpose(1, 2).contiguous(),
                    values.transpose(1, 2).contiguous(),
                )
            else:
                keys, values = keys.flatten(2), values.flatten(2)
            result, _ = fused(
                torch.cat([r.query for r in all_requests]),
                keys,
                values,
                atten_mask=MASK,
                block_table=padded(table),
                block_size=128,
                input_layout="TND",
                num_heads=4,
                num_key_value_heads=2,
                scale=0.25,
                sparse_mode=3,
                actual_seq_lengths=sums_up([len(r.query) for r in all_requests]),
                actual_seq_lengths_kv=[len(r.key) for r in all_requests],
            )
            close(result, torch.cat([r.attend(0.25, causal(r))[0] for r in all_requests]))


def check_fused_attention_in_rows():
    choose = generator(6)
    batch, queries, keys, heads, key_heads = 3, 4, 9, 4, 2
    query = torch.randn(batch, heads, queries, 16).half()
    key = torch.randn(batch, key_heads, keys, 16).half()
    value = torch.randn(batch, key_heads, keys, 16).half()
    lengths = [choose.randint(queries, keys) for _ in range(batch)]
    of_layout = {
        "BNSD": lambda t: t,
        "BSND": lambda t: t.transpose(1, 2).contiguous(),
        "BSH": lambda t: t.transpose(1, 2).flatten(2),
    }
    rows = [
        Request(query[i].transpose(0, 1), *(t[i, :, :n].transpose(0, 1) for t in (key, value)))
        for i, n in enumerate(lengths)
    ]
    options = {"num_heads": heads, "num_key_value_heads": key_heads, "scale": 0.2}
    expected = torch.stack([r.attend(0.2, causal(r))[0].transpose(0, 1) for r in rows])
    for layout, change in of_layout.items():
        result, _ = fused(
            *(change(t) for t in (query, key, value)),
            input_layout=layout,
            sparse_mode=3,
            atten_mask=MASK,
            actual_seq_lengths_kv=lengths,
            **options,
        )
        close(result, change(expected))
    hidden = torch.rand(batch, 1, queries, keys) < 0.5
    hidden[..., 0] = False
    full = [
        Request(query[i].transpose(0, 1), key[i].transpose(0, 1), value[i].transpose(0, 1))
        for i in range(batch)
    ]
    result, _ = fused(query, key, value, input_layout="BNSD", atten_mask=hidden, **options)
    seen = [r.attend(0.2, lambda t, p, i=i: not hidden[i, 0, t, p]) for i, r in enumerate(full)]
    close(result, torch.stack([s[0].transpose(0, 1) for s in seen]))


def check_latent_attention():
    choose = generator(7)
    heads, latent, rope = 32, 512, 64
    for layout in ("BNSD", "BSND"):
        all_requests = some_requests(
            choose, torch.bfloat16, (latent + rope, latent + rope), (heads, 1), one_query=True
        )
        keys, table = paged([r.key for r in all_requests], 128, choose)
        nope, rotary = (part.contiguous() for part in keys.split([latent, rope], -1))
        inside = layout == "BNSD"
        query = torch.stack([r.query for r in all_requests])  # [request, 1, head, element]
        if inside:
            query = query.transpose(1, 2)
        cache = nope.transpose(1, 2).contiguous() if inside else nope.flatten(2)
        cache_rope = rotary.transpose(1, 2).contiguous() if inside else rotary.flatten(2)
        result, _ = fused(
            query[..., :latent].contiguous(),
            cache,
            cache,
            query_rope=query[..., latent:].contiguous(),
            key_rope=cache_rope,
            block_table=padded(table),
            block_size=128,
            input_layout=layout,
            num_heads=heads,
            num_key_value_heads=1,
            scale=0.04,
            actual_seq_lengths_kv=[len(r.key) for r in all_requests],
        )
        expected = [
            Request(r.query, r.key, r.key[..., :latent]).attend(0.04, lambda t, p: True)[0]
            for r in all_requests
        ]
        stacked = torch.stack(expected)
        close(result, stacked.transpose(1, 2) if inside else stacked)


def check_what_fused_attention_refuses():
    query = torch.randn(2, 1, 8).half()
    options = {
        "input_layout": "TND",
        "num_heads": 1,
        "actual_seq_lengths": [2],
        "actual_seq_lengths_kv": [2],
    }
    refused: dict[str, dict[str, object]] = {
        "needs a mask of 2048": {"sparse_mode": 3},
        "isn't true exactly above": {"sparse_mode": 3, "atten_mask": ~MASK},
        "cumulative": {"actual_seq_lengths_kv": [3]},
        "sparse modes 0 to 4": {"sparse_mode": 5, "atten_mask": MASK},
    }
    for reason, changed in refused.items():
        fused(query, query, query, **{**options, **changed})
        with pytest.raises(RuntimeError, match=f"FusedInferAttentionScore[\\s\\S]*{reason}"):
            torch.npu.synchronize()


def check_the_second_operator_with_sinks_and_its_own_layouts():
    choose = generator(11)
    heads, latent, rope = 32, 512, 64
    all_requests = some_requests(
        choose, torch.bfloat16, (latent + rope, latent + rope), (heads, 1), one_query=True
    )
    keys, table = paged([r.key for r in all_requests], 128, choose)
    nope, rotary = (p.transpose(1, 2).contiguous() for p in keys.split([latent, rope], -1))
    query = torch.stack([r.query for r in all_requests]).transpose(1, 2)
    tensors = [query[..., :latent].contiguous(), nope, nope]
    result, _ = torch_npu.npu_fused_infer_attention_score_v2(
        *(t.to(DEVICE) for t in tensors),
        query_rope=query[..., latent:].contiguous().to(DEVICE),
        key_rope=rotary.to(DEVICE),
        block_table=padded(table).to(DEVICE),
        block_size=128,
        input_layout="BNSD_NBSD",
        num_query_heads=heads,
        num_key_value_heads=1,
        softmax_scale=0.04,
        actual_seq_kvlen=[len(r.key) for r in all_requests],
    )
    everything = [Request(r.query, r.key, r.key[..., :latent]) for r in all_requests]
    expected = torch.stack([r.attend(0.04, lambda t, p: True)[0] for r in everything])
    close(result, expected.permute(2, 0, 1, 3))


def check_sinks():
    # A sink is one more key, of a score of its own, whose value is 0.
    choose = generator(12)
    (request, *_) = some_requests(choose, torch.float16, (8, 8), (2, 2))
    sinks = torch.randn(2).half()
    result, _ = torch_npu.npu_fused_infer_attention_score_v2(
        *(t.to(DEVICE) for t in (request.query, request.key, request.value)),
        atten_mask=MASK.to(DEVICE),
        learnable_sink=sinks.to(DEVICE),
        num_query_heads=2,
        num_key_value_heads=2,
        input_layout="TND",
        sparse_mode=3,
        actual_seq_qlen=[len(request.query)],
        actual_seq_kvlen=[len(request.key)],
    )
    plain, sums = request.attend(1.0, causal(request))
    share = (sums - torch.logaddexp(sums, sinks.float()[None, :, None])).exp()
    close(result, (plain.float() * share).half())


def check_results_over_parts_of_the_keys_become_one():
    choose = generator(13)
    (request, *_) = some_requests(choose, torch.float16, (8, 8), (2, 2))
    whole, _ = request.attend(0.5, lambda t, p: True)
    parts = [
        Request(request.query.float(), request.key[part].float(), request.value[part].float())
        for part in (slice(0, 1), slice(1, None))
        if len(request.key[part])
    ]
    done = [part.attend(0.5, lambda t, p: True) for part in parts]
    joined, _ = torch_npu.npu_attention_update(
        [sums.flatten().to(DEVICE) for _, sums in done],
        [result.flatten(0, 1).to(DEVICE) for result, _ in done],
        0,
    )
    close(joined.half(), whole.flatten(0, 1))

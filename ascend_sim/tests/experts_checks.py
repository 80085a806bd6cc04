# SPDX-License-Identifier: Apache-2.0
"""Runs under the simulator: mixtures of experts and sampling, against plain torch.

Shapes are random, from a fixed seed; the references go through tokens and experts one by one.
"""

from __future__ import annotations

import ctypes
import random

import torch
import torch_npu

from tests.inference_inputs import DEVICE, HALF, Opapi, close, generator


def chosen_experts(choose: random.Random, tokens: int, experts: int, choices: int) -> torch.Tensor:
    """[token, choice], no expert twice for a token."""
    rows = [choose.sample(range(experts), choices) for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int32)


def sorted_pairs(experts: torch.Tensor) -> list[tuple[int, int]]:
    """(token, choice), by expert, those of one expert as they come."""
    tokens, choices = experts.shape
    pairs = [(token, choice) for token in range(tokens) for choice in range(choices)]
    return sorted(pairs, key=lambda pair: int(experts[pair]))


def check_gating_by_softmax():
    choose = generator(20)
    for dtype in (torch.float32, *HALF):
        tokens, experts, choices = choose.randint(1, 9), choose.randint(4, 17), choose.randint(1, 4)
        x = torch.randn(tokens, experts).to(dtype)
        weights, index, rows = torch_npu.npu_moe_gating_top_k_softmax(x.to(DEVICE), None, choices)
        best = x.float().softmax(-1).topk(choices)
        close(weights, best.values.to(dtype))
        assert torch.equal(x.gather(1, index.cpu().long()), x.gather(1, best.indices))
        numbers = [
            [choice * tokens + token for choice in range(choices)] for token in range(tokens)
        ]
        assert rows.cpu().tolist() == numbers


def check_gating_in_groups():
    generator(21)
    for norm in (0, 1):
        x, bias = torch.randn(6, 16), torch.randn(16)
        weights, index, scores = torch_npu.npu_moe_gating_top_k(
            x.to(DEVICE),
            3,
            bias=bias.to(DEVICE),
            k_group=2,
            group_count=4,
            group_select_mode=1,
            norm_type=norm,
            out_flag=True,
            routed_scaling_factor=2.5,
        )
        plain = x.softmax(-1) if norm == 0 else x.sigmoid()
        close(scores, plain)
        for token in range(6):
            biased = (plain[token] + bias).view(4, 4)
            groups = sorted(range(4), key=lambda g, b=biased: -b[g].topk(2).values.sum().item())[:2]
            allowed = [g * 4 + e for g in groups for e in range(4)]
            flat = biased.flatten()
            best = sorted(allowed, key=lambda e, f=flat: -f[e].item())[:3]
            assert index[token].cpu().tolist() == best
            expected = plain[token][best]
            if norm == 1:
                expected = expected / expected.sum()
            close(weights[token], expected * 2.5)


def check_tokens_sorted_by_expert_and_back():
    choose = generator(22)
    for first, end in ((0, 8), (2, 5)):
        tokens, choices, experts = choose.randint(1, 9), choose.randint(1, 3), 8
        x = torch.randn(tokens, 16).half()
        which = chosen_experts(choose, tokens, experts, choices)
        rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x.to(DEVICE),
            which.to(DEVICE),
            active_num=tokens * choices,
            expert_num=experts,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            active_expert_range=[first, end],
            quant_mode=-1,
        )
        active = [pair for pair in sorted_pairs(which) if first <= which[pair] < end]
        places = torch.full((tokens, choices), -1, dtype=torch.int32)
        for place, pair in enumerate(active):
            places[pair] = place
            assert torch.equal(rows[place].cpu(), x[pair[0]])
        assert torch.equal(index.cpu(), places.flatten())
        assert counts.cpu().tolist() == [int((which == e).sum()) for e in range(first, end)]
        if (first, end) != (0, experts):
            continue
        weights = torch.rand(tokens, choices).half()
        back = torch_npu.npu_moe_token_unpermute(rows, index, weights.to(DEVICE))
        close(back, (x.float() * weights.float().sum(1, keepdim=True)).half())
        final = torch_npu.npu_moe_finalize_routing(
            rows, x.to(DEVICE), None, None, weights.to(DEVICE), index, which.to(DEVICE), 2
        )
        close(final, (x.float() * (1 + weights.float().sum(1, keepdim=True))).half())


def check_routing_by_the_extension():
    choose = generator(26)
    opapi = Opapi()
    x, which = torch.randn(4, 8).half(), chosen_experts(choose, 4, 6, 2)
    inputs = [x.to(DEVICE), which.to(DEVICE)]
    rows, index = torch.zeros(8, 8).half().to(DEVICE), torch.zeros(8, dtype=torch.int32).to(DEVICE)
    counts, scale = torch.zeros(6, dtype=torch.int64).to(DEVICE), torch.zeros(8, device=DEVICE)
    torch.npu.synchronize()
    numbers = [ctypes.c_int64(n) for n in (8, -1, 6, 0, 1)]
    opapi.launch(
        "aclnnMoeInitRoutingCustom",
        *map(opapi.tensor, inputs),
        None,
        None,
        *numbers,
        ctypes.c_bool(True),
        ctypes.c_int64(-1),
        opapi.ints(0, 6),
        ctypes.c_int64(0),
        *map(opapi.tensor, (rows, index, counts, scale)),
    )
    pairs = sorted_pairs(which)
    assert torch.equal(rows.cpu(), x[[token for token, _ in pairs]])
    assert index.cpu().tolist() == [pairs.index((t, c)) for t in range(4) for c in range(2)]
    assert counts.cpu().tolist() == which.flatten().bincount(minlength=6).tolist()


def check_token_permute():
    choose = generator(23)
    tokens, choices = 5, 2
    x = torch.randn(tokens, 8).half()
    which = chosen_experts(choose, tokens, 6, choices)
    rows, index = torch_npu.npu_moe_token_permute(x.to(DEVICE), which.to(DEVICE), 7)
    pairs = sorted_pairs(which)
    assert torch.equal(rows.cpu(), x[[token for token, _ in pairs[:7]]])
    expected = [pairs.index((t, c)) for t in range(tokens) for c in range(choices)]
    assert index.cpu().tolist() == expected


def check_grouped_products():
    choose = generator(24)
    for dtype in HALF:
        sizes = [choose.randint(0, 4) for _ in range(4)]
        x = torch.randn(sum(sizes) + 1, 8).to(dtype)
        weight = torch.randn(4, 8, 5).to(dtype)
        ends = torch.tensor(sizes).cumsum(0)
        for list_type, groups in ((0, ends), (1, torch.tensor(sizes))):
            (out,) = torch_npu.npu_grouped_matmul(
                x=[x.to(DEVICE)],
                weight=[weight.to(DEVICE)],
                split_item=2,
                group_type=0,
                group_list_type=list_type,
                group_list=groups.to(DEVICE),
            )
            start = 0
            for number, end in enumerate(ends.tolist()):
                product = x[start:end].float() @ weight[number].float()
                close(out[start:end], product.to(dtype))
                start = end


def check_scores_kept_for_sampling():
    generator(25)
    scores = torch.randn(6, 20) * 3
    k = torch.tensor([1, 2, 5, 20, 3, 7], dtype=torch.int32)
    p = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.8, 1.0])
    for with_p, with_k in ((True, True), (True, False), (False, True)):
        kept = torch_npu.npu_top_k_top_p(
            scores.to(DEVICE),
            p.to(DEVICE) if with_p else None,
            k.to(DEVICE) if with_k else None,
        ).cpu()
        for row in range(6):
            order = scores[row].argsort(descending=True).tolist()
            left = order[: int(k[row])] if with_k else order
            if with_p:
                parts = scores[row][left].softmax(0)
                needed = int((parts.cumsum(0) - parts < p[row] - 1e-6).sum())
                left = left[: max(needed, 1)]
            expected = torch.full((20,), -torch.inf)
            expected[left] = scores[row][left]
            assert torch.equal(kept[row], expected), (row, with_p, with_k)

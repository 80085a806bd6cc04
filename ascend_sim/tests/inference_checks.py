# SPDX-License-Identifier: Apache-2.0
"""Runs under the simulator: the kernels that serving engines call, against plain torch.

Shapes are random, from a fixed seed; the references compute one token after the other.
"""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
import torch_npu

from ascend_sim import faults
from tests.inference_inputs import DEVICE, HALF, Opapi, close, generator

# -- libatb ------------------------------------------------------------------------------------


def check_reshape_and_cache():
    choose = generator(1)
    for dtype in (*HALF, torch.int8):
        tokens, heads, width, value_width = (choose.randint(1, 9) for _ in range(4))
        blocks, block_size = choose.randint(2, 5), choose.choice([4, 8])
        key = torch.randn(tokens, heads, width).mul(9).to(dtype)
        value = torch.randn(tokens, heads, value_width).mul(9).to(dtype)
        caches = [
            torch.zeros(blocks, block_size, heads, w, dtype=dtype) for w in (width, value_width)
        ]
        slots = torch.randperm(blocks * block_size)[:tokens].to(torch.int32)
        slots[choose.randrange(tokens)] = -1
        ours = [cache.to(DEVICE) for cache in caches]
        torch_npu._npu_reshape_and_cache(
            key.to(DEVICE), value.to(DEVICE), ours[0], ours[1], slots.to(DEVICE)
        )
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                for rows, cache in zip((key, value), caches, strict=True):
                    cache[slot // block_size, slot % block_size] = rows[token]
        for mine, cache in zip(ours, caches, strict=True):
            assert torch.equal(mine.cpu(), cache)


def check_reshape_and_cache_of_keys_alone():
    key = torch.randn(3, 2, 4, device=DEVICE)
    cache = torch.zeros(2, 4, 2, 4, device=DEVICE)
    slots = torch.tensor([5, -1, 0], dtype=torch.int32, device=DEVICE)
    torch_npu._npu_reshape_and_cache_siso(key, cache, slots)
    expected = torch.zeros(8, 2, 4)
    expected[5], expected[0] = key.cpu()[0], key.cpu()[2]
    assert torch.equal(cache.cpu().flatten(0, 1), expected)


def check_a_slot_out_of_range_is_an_error():
    cache = torch.zeros(2, 4, 1, 2, device=DEVICE)
    row = torch.ones(1, 1, 2, device=DEVICE)
    slots = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    torch_npu._npu_reshape_and_cache(row, row, cache, cache.clone(), slots)
    with pytest.raises(RuntimeError, match=r"ReshapeAndCacheOperation failed[\s\S]*out of"):
        torch.npu.synchronize()
    assert (cache + 1).sum().item() == 16


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool) -> torch.Tensor:
    """Heads of [token, head, element], turned by the angles of [token, element / 2]."""
    x, cos, sin = x.float(), cos.float()[:, None], sin.float()[:, None]
    if halves:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def check_rotary_embedding():
    # The operation keeps the cosines of its first call: one size of heads in one process, as in a
    # model, and the two ways of turning have their own.
    choose = generator(2)
    width = 16
    angles = torch.rand(50, width // 2) * 6
    table = torch.cat([angles.cos(), angles.sin()], -1)
    for halves in (True, False):
        for _ in range(3):
            tokens, heads, key_heads = (choose.randint(1, 7) for _ in range(3))
            positions = torch.randint(0, 50, (tokens,))
            query, key = torch.randn(tokens, heads * width), torch.randn(tokens, key_heads * width)
            ours = query.to(DEVICE), key.to(DEVICE)
            torch_npu._npu_rotary_embedding(
                positions.to(DEVICE), *ours, width, table.to(DEVICE), halves
            )
            cos, sin = table[positions].chunk(2, -1)
            for mine, plain in zip(ours, (query, key), strict=True):
                heads_of = plain.view(tokens, -1, width)
                close(mine, rotated(heads_of, cos, sin, halves).view_as(plain))


def check_matmul_add():
    choose = generator(3)
    for dtype in HALF:
        rows, inner, columns = (choose.randint(1, 30) for _ in range(3))
        x, weight = torch.randn(inner, rows).to(dtype), torch.randn(inner, columns).to(dtype)
        total = torch.randn(rows, columns)
        ours = total.to(DEVICE)
        torch_npu._npu_matmul_add_fp32(x.to(DEVICE), weight.to(DEVICE), ours)
        close(ours, total + x.float().T @ weight.float())


def check_an_operation_that_is_not_simulated_is_named():
    query = torch.randn(2, 1, 8, dtype=torch.float16, device=DEVICE)
    cache = torch.zeros(2, 16, 1, 8, dtype=torch.float16, device=DEVICE)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="PagedAttention"):
        torch_npu._npu_paged_attention(
            query, cache, cache, 1, 1, 1.0, table, torch.ones(2, dtype=torch.int32), query.clone()
        )
    assert (query * 0).sum().item() == 0


def check_an_atb_operation_is_a_task_of_the_stream():
    cache = torch.zeros(1, 4, 1, 2, device=DEVICE)
    row = torch.ones(1, 1, 2, device=DEVICE)
    slots = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    torch.npu.synchronize()
    faults.fail("task.ReshapeAndCacheOperation", code=507035)
    torch_npu._npu_reshape_and_cache(row, row, cache, cache.clone(), slots)
    with pytest.raises(RuntimeError, match="507035"):
        torch.npu.synchronize()
    faults.reset()


# -- norms, rotary embedding, activations ----------------------------------------------------------


def rms(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gamma.float()


def check_norms():
    choose = generator(8)
    for dtype in (torch.float32, *HALF):
        rows, width = choose.randint(1, 9), choose.choice([8, 48])
        x1, x2 = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        gamma = torch.rand(width).to(dtype)
        ours = [t.to(DEVICE) for t in (x1, x2, gamma)]
        close(torch_npu.npu_rms_norm(ours[0], ours[2])[0], rms(x1, gamma).to(dtype))
        close(
            torch_npu.npu_gemma_rms_norm(ours[0], ours[2])[0], rms(x1, 1 + gamma.float()).to(dtype)
        )
        y, _, total = torch_npu.npu_add_rms_norm(*ours)
        close(total, x1 + x2)
        close(y, rms(x1 + x2, gamma).to(dtype))
        torch_npu.npu_add_rms_norm_v2(*ours)
        close(ours[1], x1 + x2)
        close(ours[0], rms(x1 + x2, gamma).to(dtype))


def check_add_rms_norm_with_a_bias():
    generator(10)
    opapi = Opapi()
    for dtype in (torch.float32, *HALF):
        x1, x2 = torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype)
        gamma, beta = torch.rand(8).to(dtype), torch.randn(8).to(dtype)
        inputs = [t.to(DEVICE) for t in (x1, x2, gamma, beta)]
        outputs = [torch.zeros_like(inputs[0]) for _ in range(2)]
        scale = torch.zeros(3, 1, device=DEVICE)
        torch.npu.synchronize()
        opapi.launch(
            "aclnnAddRmsNormBias",
            *map(opapi.tensor, inputs),
            ctypes.c_double(1e-6),
            *map(opapi.tensor, (outputs[0], scale, outputs[1])),
        )
        close(outputs[1], x1 + x2)
        close(outputs[0], (rms(x1 + x2, gamma) + beta.float()).to(dtype))


def check_rotary_mul_and_swiglu():
    choose = generator(9)
    for dtype in (torch.float32, *HALF):
        tokens, heads = choose.randint(1, 5), choose.randint(1, 5)
        x = torch.randn(1, tokens, heads, 64).to(dtype)
        angles = torch.rand(tokens, 32) * 6
        full = torch.cat([angles, angles], -1)[None, :, None]
        cos, sin = full.cos().to(dtype), full.sin().to(dtype)
        ours = torch_npu.npu_rotary_mul(*(t.to(DEVICE) for t in (x, cos, sin)))
        plain = rotated(x[0], cos[0, :, 0, :32], sin[0, :, 0, :32], True)
        close(ours, plain[None].to(dtype))
        gate, up = x.chunk(2, -1)
        expected = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
        close(torch_npu.npu_swiglu(x.to(DEVICE)), expected)


def check_rotary_embedding_in_place():
    choose = generator(14)
    tokens, heads = choose.randint(1, 5), choose.randint(1, 5)
    query, key = torch.randn(1, tokens, heads, 128).half(), torch.randn(1, tokens, 1, 128).half()
    angles = torch.rand(tokens, 64) * 6
    full = torch.cat([angles, angles], -1)[None, :, None]
    cos, sin = full.cos().half(), full.sin().half()
    ours = torch_npu.npu_apply_rotary_pos_emb(*(t.to(DEVICE) for t in (query, key, cos, sin)))
    for mine, plain in zip(ours, (query, key), strict=True):
        close(mine, rotated(plain[0], cos[0, :, 0, :64], sin[0, :, 0, :64], True)[None].half())


def apart(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def check_rotary_embedding_of_neighbours():
    x = torch.randn(3, 4, 1, 64).half()
    angles = torch.rand(3, 32) * 6
    full = torch.cat([angles, angles], -1)[:, None, None]
    cos, sin = full.cos().half(), full.sin().half()
    ours = torch_npu.npu_interleave_rope(*(t.to(DEVICE) for t in (x, cos, sin)))
    plain = rotated(apart(x[:, :, 0]), cos[:, 0, 0, :32], sin[:, 0, 0, :32], True)
    close(ours, plain[:, :, None].half())


def check_latent_keys_go_to_their_caches():
    generator(15)
    tokens = 4
    kv, gamma = torch.randn(tokens, 1, 1, 576).bfloat16(), torch.rand(512).bfloat16()
    angles = torch.rand(tokens, 32) * 6
    full = torch.cat([angles, angles], -1)[:, None, None]
    cos, sin = full.cos().bfloat16(), full.sin().bfloat16()
    slots = torch.tensor([130, -1, 3, 255])
    caches = [torch.zeros(2, 128, 1, width).bfloat16().to(DEVICE) for width in (64, 512)]
    moved = [t.to(DEVICE) for t in (kv, gamma, cos, sin, slots)]
    _, _, rope, latent = torch_npu.npu_kv_rmsnorm_rope_cache(
        *moved, *caches, epsilon=1e-6, cache_mode="PA", is_output_kv=True
    )
    turned = rotated(apart(kv[:, 0, :, 512:]), cos[:, 0, 0, :32], sin[:, 0, 0, :32], True)
    normed = rms(kv[:, 0, :, :512], gamma)
    for part, plain, cache in zip((rope, latent), (turned, normed), caches, strict=True):
        close(part[:, 0], plain.bfloat16())
        expected = torch.zeros(256, 1, plain.shape[-1]).bfloat16()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot] = part[token, 0].cpu()
        assert torch.equal(cache.cpu().flatten(0, 1), expected)


def check_scatter_into_a_cache():
    key, value = torch.randn(3, 2, 8).half(), torch.randn(3, 2, 8).half()
    caches = [torch.zeros(2, 16, 2, 8).half().to(DEVICE) for _ in range(2)]
    slots = torch.tensor([17, -1, 4], dtype=torch.int32)
    torch_npu.npu_scatter_pa_kv_cache(
        key.to(DEVICE), value.to(DEVICE), *caches, slots.to(DEVICE), cache_mode="Norm"
    )
    for rows, cache in zip((key, value), caches, strict=True):
        expected = torch.zeros(32, 2, 8).half()
        expected[17], expected[4] = rows[0], rows[2]
        assert torch.equal(cache.cpu().flatten(0, 1), expected)
    torch_npu.npu_scatter_pa_kv_cache(key.to(DEVICE), value.to(DEVICE), *caches, slots.to(DEVICE))
    with pytest.raises(RuntimeError, match=r"ScatterPaKvCache failed[\s\S]*PA_NZ"):
        torch.npu.synchronize()


def check_transposed_products():
    x, weight = torch.randn(4, 5, 6).half(), torch.randn(4, 6, 7).half()
    ours = torch_npu.npu_transpose_batchmatmul(x.to(DEVICE), weight.to(DEVICE), perm_y=(1, 0, 2))
    close(ours, (x.float() @ weight.float()).transpose(0, 1).half())


# -- what comes with it ----------------------------------------------------------------------------


def check_the_module_acl():
    acl_rt = importlib.import_module("acl.rt")
    device = torch.zeros(16, dtype=torch.uint8, device=DEVICE)
    host = torch.arange(16, dtype=torch.uint8)
    torch.npu.synchronize()
    assert acl_rt.memcpy(device.data_ptr(), 16, host.data_ptr(), 16, 1) == 0
    assert torch.equal(device.cpu(), host)
    assert acl_rt.memcpy(device.data_ptr(), 8, host.data_ptr(), 16, 1) != 0

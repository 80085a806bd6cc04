#!/usr/bin/env bash
# With one quantised model, vllm-ascend's decode engine keeps its KV in int8 and its prefill engine does not.
#
# Versions: vllm-ascend 0.23.0, its class for int8 KV caches (C8) of dense attention; torch 2.13.0.
# Expect:   two engines with the same model and quantisation have KV of the same dtype; it is a property of the model.
# Happens:  a layer is given int8 when its engine is not a KV producer, and keeps the model's dtype when it is one. kv_both counts
#           as a producer with vLLM. Scales and offsets belong to the layer on both sides.
# Matters:  blocks of the two ends differ in bytes by a factor of two; a connector that copies them whole, or compares models and
#           not dtypes, moves half a block or garbage. The one who moves KV has to quantise on the way.
. "$(dirname "$0")/_common.sh"
install_vllm_ascend torch==2.13.0 numpy==2.4.6

cat >"$dir/seen" <<'SEEN'
kv_producer: KV in torch.bfloat16, 32768 bytes in a block of 128 tokens of a head
kv_consumer: KV in torch.int8, 16384 bytes in a block of 128 tokens of a head
no connector: KV in torch.int8, 16384 bytes in a block of 128 tokens of a head
parameters of a layer at both ends: k_cache_offset, k_cache_scale, v_cache_offset, v_cache_scale
SEEN

show "$dir/seen" <<'PYTHON'
from types import SimpleNamespace
from unittest.mock import Mock

import torch

import ascend

BLOCK, DIM = 128, 128


def layer_of(transfer):
    method = ascend.definition(
        "quantization/methods/kv_c8.py",
        "AscendC8KVCacheAttentionMethod",
        torch=torch,
        AscendAttentionScheme=object,
        register_scheme=lambda *names: lambda scheme: scheme,
        logger=Mock(),
        get_current_vllm_config=lambda: SimpleNamespace(kv_transfer_config=transfer),
        _c8_kv_scale_weight_loader=None,
    )
    layer = torch.nn.Module()
    layer.kv_cache_torch_dtype = torch.bfloat16  # what vLLM's attention layer has set from the model before
    method({}, "model.layers.0").create_weights(layer)
    return layer


ends = {
    "kv_producer": layer_of(SimpleNamespace(is_kv_producer=True)),
    "kv_consumer": layer_of(SimpleNamespace(is_kv_producer=False)),
    "no connector": layer_of(None),
}
for name, layer in ends.items():
    dtype = layer.kv_cache_torch_dtype
    print(f"{name}: KV in {dtype}, {BLOCK * DIM * dtype.itemsize} bytes in a block of {BLOCK} tokens of a head")
(parameters,) = {", ".join(sorted(name for name, _ in layer.named_parameters())) for layer in ends.values()}
print("parameters of a layer at both ends:", parameters)
PYTHON

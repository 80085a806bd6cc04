# SPDX-License-Identifier: Apache-2.0
"""Models that are made in place: small ones with random weights, and a tokenizer.

    python examples/vllm/tiny_model.py DIRECTORY [KIND [SEED]]

The kinds: "llama"; "gemma3" has layers with a sliding window and layers without, "mistral" only the
former; "lfm2" has short convolutions and attention; "deepseek" has multi-head latent attention
(MLA).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 1024


WINDOW = 64
"""Tokens of the sliding windows."""

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    # Large enough that tokens depend on the whole prompt.
    "initializer_range": 0.2,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **_SIZES,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=kinds,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma3ForCausalLM(config)


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SIZES, head_dim=32, sliding_window=WINDOW))


def _lfm2() -> PreTrainedModel:
    kinds = ["conv", "full_attention"] * 2
    # vLLM reads the block's size where published models have it, beside transformers' own fields.
    size = _SIZES["hidden_size"]
    return Lfm2ForCausalLM(Lfm2Config(**_SIZES, layer_types=kinds, conv_dim=size, block_dim=size))


def _deepseek() -> PreTrainedModel:
    # The ranks are the large model's: vLLM's kernel for CPUs has no others.
    config = DeepseekV2Config(
        **_SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4},
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        # All of its layers are dense.
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
    )
    return DeepseekV2ForCausalLM(config)


KINDS = {
    "llama": _llama,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "lfm2": _lfm2,
    "deepseek": _deepseek,
}


def save_tiny_model(directory: Path, kind: str = "llama", seed: int = 7) -> Path:
    """Save it in a directory, the same one each time; with another seed, one of other weights."""
    torch.manual_seed(seed)
    KINDS[kind]().save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cache of one engine is read by another"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    given = dict(zip(("kind", "seed"), sys.argv[2:4], strict=False))
    save_tiny_model(Path(sys.argv[1]), given.get("kind", "llama"), int(given.get("seed", 7)))

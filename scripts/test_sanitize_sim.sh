#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the simulated Ascend runtime with a driver of several threads, under AddressSanitizer with UBSan and under
# ThreadSanitizer, and runs it with each scheduler. PYTHON chooses the interpreter that has torch_npu.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv-npu/bin/python}
out=$root/build/sanitize-sim
include=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch_npu"); print(s.submodule_search_locations[0] if s else "")')
if [ -z "$include" ]; then
  echo "test_sanitize_sim: skipped: $python has no torch_npu, whose headers it needs"
  exit 0
fi
include=$include/include/third_party/acl/inc
mkdir -p "$out"
for sanitizer in address,undefined thread; do
  echo "building with -fsanitize=$sanitizer"
  objects=$out/$sanitizer
  mkdir -p "$objects"
  printf '%s\n' "$root"/ascend_sim/src/ascend_sim/csrc/runtime/*.cpp "$root/ascend_sim/tests/runtime_stress.cpp" |
    xargs -P "$(nproc)" -I{} sh -c 'g++ -std=c++20 -O1 -g "$@" -c {} -o "$0/$(basename {}).o"' "$objects" \
      -fsanitize="$sanitizer" -fno-sanitize-recover=all -DFUNC_VISIBILITY -Wno-deprecated-declarations -isystem "$include"
  g++ -fsanitize="$sanitizer" "$objects"/*.o -o "$out/stress-$sanitizer" -lpthread
  for scheduler in lazy random inline; do
    seed=$RANDOM
    echo "scheduler $scheduler, seed $seed"
    # ThreadSanitizer's shadow needs addresses that are not at random places; setarch fixes them.
    ASCEND_SIM_SCHEDULER=$scheduler ASCEND_SIM_SEED=$seed ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1 \
      timeout 120 setarch "$(uname -m)" -R "$out/stress-$sanitizer"
  done
done

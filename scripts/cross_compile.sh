#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles the torch-free part of csrc/ for aarch64, which most Ascend servers are, so that no x86 code gets in.
set -euo pipefail

compiler=${CROSS_CXX:-aarch64-linux-gnu-g++}
cd "$(dirname "$0")/.."
if ! command -v "$compiler" >/dev/null; then
  echo "cross_compile: skipped: no $compiler here (Debian: apt-get install g++-aarch64-linux-gnu)"
  exit 0
fi

# Torch-free is what reaches no header of torch or pybind11, directly or through our own headers.
tainted='#include [<"](torch|ATen|c10|pybind11)/'
tainted_headers=$(grep -lE "$tainted" csrc/*.h | xargs -n1 basename | paste -sd'|' || true)
count=0
for file in csrc/*.cpp; do
  if grep -qE "$tainted" "$file"; then continue; fi
  if [ -n "$tainted_headers" ] && grep -qE "#include \"($tainted_headers)\"" "$file"; then continue; fi
  "$compiler" -std=c++17 -O2 -Wall -Wextra -Werror -Wno-unused-parameter -c "$file" -o /dev/null
  count=$((count + 1))
done
if [ "$count" -eq 0 ]; then
  echo "cross_compile: found no torch-free file in csrc/" >&2
  exit 1
fi
echo "cross_compile: $count files compile with $compiler"

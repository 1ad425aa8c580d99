# Everything a user or CI runs. `make search` and `make test` need only Python 3.11+ (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Heddle parallelises over processes; threads inside each would only fight over the same cores.
export OMP_NUM_THREADS ?= 1
# Containers often forbid bytecode. Without it every process that a test starts compiles Heddle anew, for more than a second.
export PYTHONDONTWRITEBYTECODE :=

# Only these files are read on a GPU machine, which may lack what the other tests import.
GPU_TESTS = $(shell grep -rlE 'mark\.gpu|over_settings' tests --include='*.py')

# What compares times runs after the others, with nothing beside it.
TIMED_TESTS = $(shell grep -rlE 'mark\.alone' tests --include='*.py')

# Three workers for two cores: a third of the time tests wait for processes that they started.
SPREAD = $(BIN)/python -m pytest -n 3 --durations 25 --durations-min 5 --dist loadfile --no-loadscope-reorder

.PHONY: help install search test test-fast test-long test-gpu lint bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make search      install, then search examples/quickstart.yaml and export the winner'
	@echo 'make test        install, then lint, types and every test that needs no GPU (20 minutes at most)'
	@echo 'make test-fast   the same without the slow tests (2 minutes at most)'
	@echo 'make test-long   the full counts; appends a row to tests/bench/results/evidence-tests-long.jsonl'
	@echo 'make test-gpu    the GPU tests, with the python3 of this machine; installs nothing, a skip fails'
	@echo 'make bench       times the kernels and appends rows to tests/bench/results/'
	@echo 'make clean       removes .venv, caches and build outputs; keeps runs/'

install: $(INSTALLED)

# The stamp is written last, so that an install cut short is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("heddle needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

search: $(INSTALLED)
	$(BIN)/heddle search examples/quickstart.yaml

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(SPREAD) -m 'not gpu and not long and not alone'
	$(BIN)/python -m pytest -m alone $(TIMED_TESTS)

test-fast: lint
	$(SPREAD) -m 'not gpu and not long and not slow'

test-long: $(INSTALLED)
	$(BIN)/python tests/bench/long_tests.py

test-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest -m gpu --no-skips -p no:cacheprovider -p no:benchmark $(GPU_TESTS)

bench: $(INSTALLED)
	$(BIN)/python tests/bench/run.py

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

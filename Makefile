# Everything below sets itself up: a virtual environment in the checkout, the package in it, editable.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all lint bench wheel clean

help:
	@echo "make demo      take ten small networks apart and build a new one under a budget"
	@echo "make test      lint, then the tests (about 11 minutes on 2 cores)"
	@echo "make test-all  the slow tests too"
	@echo "make lint      ruff and mypy"
	@echo "make bench     speed and memory, each against a named reference"
	@echo "make wheel     build dist/*.whl"

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(READY)

setup: $(READY)

demo: $(READY)
	$(BIN)/dery demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one thread a worker: two workers with two threads each would only fight for two cores
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

bench: $(READY)
	@set -e; for bench in tests/bench/bench_*.py; do \
		echo "== $$bench"; $(BIN)/python $$bench; done

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache

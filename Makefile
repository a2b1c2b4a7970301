# make demo    the main job on embedded digits, with a table and a picture
# make test    lint, types and all tests
# make coverage   the tests once more, with coverage
# make bench   the table of speeds, beside breaching
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
# bytecode is written by the first import of what is used, and not for every file of every library
PIP    := --quiet --no-compile

.PHONY: demo test lint types pytest coverage bench wheel clean

demo: $(STAMPS)/run
	$(BIN)/gia-bench -m experiment=demo defense=none,dgp paths.outputs=outputs
	$(BIN)/gia-bench-report 'runs=[outputs/demo]' output=outputs/demo/report

test: lint types pytest

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

# two workers of one thread each: small tensors gain nothing from more threads
pytest: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=25

# the same with coverage, which must be 90 %; tracing takes two thirds more time, so that it is no part of make test
coverage: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov --cov-report=term-missing:skip-covered

bench: $(STAMPS)/bench
	$(BIN)/python scripts/bench.py

wheel: $(STAMPS)/dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gia_bench needs Python 3.11 or newer; choose one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install $(PIP) --editable .
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install $(PIP) --editable '.[dev]'
	mkdir -p $(STAMPS) && touch $(STAMPS)/run $@

$(STAMPS)/bench: $(STAMPS)/dev
	$(BIN)/python -m pip install $(PIP) --editable '.[dev,bench]'
	touch $@

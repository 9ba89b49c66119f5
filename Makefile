# Needs Python 3.11 or newer and make; everything else is installed into .venv from the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
CONFIG ?= configs/compare/digits.yaml

.PHONY: help setup demo test lint format clean

help:
	@echo "make demo    train a dense Swin and its sparse twin on real digits (minutes on a laptop), write a report"
	@echo "make test    set up and run all tests"
	@echo "make lint    ruff, mypy and the architecture contract"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "swinmoe needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (once; torch is large) ..."
	@began=$$(date +%s); $(PYTHON) -m venv $(VENV) \
	  && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  && touch $(READY) && echo "set up in $$(( $$(date +%s) - began )) s"

setup: $(READY)

demo: $(READY)
	@began=$$(date +%s); $(BIN)/swinmoe compare $(CONFIG) name=demo-$$(date +%Y%m%d-%H%M%S) \
	  && echo "demo ran for $$(( $$(date +%s) - began )) s (installation apart)"

# One thread a process: several processes share the cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

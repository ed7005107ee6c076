# Two commands for everyone: `make run` and `make test`. Each sets up what it needs in .venv, once.
# Needs python3 >= 3.10 with venv and pip; choose another one with `make run PYTHON=python3.12`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
CONFIG ?= configs/fedavg.yaml
ARGS   ?=
# two cores are common and torch's own threads fight for them
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help run test check lint types docs docs-serve setup format clean

help:            ## show this list
	@sed -nE 's/^([a-z-]+):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

run: $(VENV)/run.stamp ## set up and run the main job: FedAvg on the embedded digits (CONFIG=..., ARGS=...)
	$(BIN)/fl-lightning fit --config $(CONFIG) $(ARGS)

test: $(VENV)/dev.stamp ## set up and run all tests and doctests, warnings are errors (ARGS="tests/data -x")
	$(BIN)/python -m pytest $(or $(ARGS),-n 2)

check: lint types test ## everything a change must pass

lint: $(VENV)/dev.stamp ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## mypy, strict on the package
	$(BIN)/mypy

docs: $(VENV)/docs.stamp ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/docs.stamp ## show the documentation on 127.0.0.1:8000 while you write
	$(BIN)/mkdocs serve

format: $(VENV)/dev.stamp ## format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/dev.stamp $(VENV)/docs.stamp ## install everything for development

clean:           ## remove the environment and every cache (logs/ stays)
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache

# A stamp is written when its installation is complete, so an interrupted one starts again.
$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else f"Expected Python 3.10 or newer, got {sys.version.split()[0]}. Run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	$(PIP) -e '.[dev,data]'
	@touch $@ $(VENV)/run.stamp

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/venv.stamp
	$(PIP) -e '.[docs]'
	@touch $@

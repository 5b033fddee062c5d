# Everything runs in .venv, which each target makes when it is not there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check unit mutants bench-aggregate clean

demo: $(STAMP)  ## compare the strategies on real data; ends in runs/demo/report.html
	$(BIN)/fedlora compare experiments/demo.toml --out runs/demo --resume

test: check unit  ## everything that must hold before a change lands

check: $(STAMP)  ## style, types, direction of imports, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q --doctest-modules fedlora strategies clients

unit: $(STAMP)
	$(BIN)/python -m pytest -q tests

mutants: $(STAMP)  ## wrong formulas, and the test that finds each of them
	$(BIN)/python -m tests.mutants

bench-aggregate: $(STAMP)  ## every method's server step at LLaMA-7B shapes; about half an hour
	$(BIN)/python -m experiments.benchmarks.aggregate

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:  ## remove what runs and builds left behind
	rm -rf runs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

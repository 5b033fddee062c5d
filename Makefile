# Everything runs in .venv, which each target makes when it is not there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOMAINS := amazon movie nyt
TOOLS := build/tools

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

# Test processes side by side: two cores are the least that a machine has, and a process waits for a third of its time.
WORKERS ?= 3

.PHONY: demo docs test check unit quick test-faults mutants audit sbom bench-aggregate bench-engine bench-deployment bench-gpu federation clean

demo: $(STAMP)  ## compare the strategies on real data; ends in runs/demo/report.html
	$(BIN)/fedlora compare experiments/demo.toml --out runs/demo --resume

docs: $(STAMP)  ## the documentation as a site in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html, or with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

federation: $(STAMP)  ## three nodes that own their data, TLS and node keys on the loopback; ends with the accuracy
	rm -rf runs/federation
	$(BIN)/python -m experiments.federation_data runs/federation/data
	$(BIN)/fedlora federation init runs/federation/net --nodes 3 $(DOMAINS:%=--data runs/federation/data/%.jsonl)
	$(BIN)/fedlora federation up runs/federation/net --detach
	$(BIN)/fedlora run experiments/federation.toml --federation runs/federation/net --out runs/federation/out; \
	    status=$$?; $(BIN)/fedlora federation down runs/federation/net; exit $$status

test: $(STAMP)  ## everything that must hold before a change lands; types and tests side by side
	$(MAKE) -j2 check unit

check: $(STAMP)  ## style, types, direction of imports, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q --doctest-modules fedlora strategies clients

unit: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not deployed" tests

quick: $(STAMP)  ## the laws of values, messages, whole rounds and saved adapters; about a minute
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --hypothesis-profile quick \
	    -m "not deployed and not slow" \
	    tests/core tests/wire tests/models tests/aggregate tests/deployment tests/federation tests/experiments

# What takes longest begins first, so that the last process does not work alone. Two, as each brings a federation.
test-faults: $(STAMP)  ## with real Flower processes on the loopback; minutes
	$(BIN)/python -m pytest -v -n 2 --dist loadfile --no-loadscope-reorder -m deployed $(FLAGS) \
	    tests/faults/test_secure_sums.py tests/faults/test_bad_updates.py \
	    $$(grep -rl --include='test_*.py' 'mark\.deployed' tests | sort)

mutants: $(STAMP)  ## wrong formulas, and the test that finds each of them
	$(BIN)/python -m tests.mutants

audit: $(TOOLS)/.installed  ## known vulnerabilities of the pinned packages; what could not be looked up is said, not passed
	$(TOOLS)/bin/pip-audit -r constraints.txt --no-deps --disable-pip -f json -o build/audit.json; test -s build/audit.json
	$(TOOLS)/bin/python experiments/audited.py build/audit.json

sbom: $(STAMP) $(TOOLS)/.installed  ## what is installed in .venv with versions and licences, as build/sbom.json (CycloneDX)
	$(TOOLS)/bin/cyclonedx-py environment --of JSON -o build/sbom.json $(BIN)/python

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

bench-aggregate: $(STAMP)  ## every method's server step at LLaMA-7B shapes; about half an hour
	$(BIN)/python -m experiments.benchmarks.aggregate

bench-engine: $(STAMP)  ## fedlora beside a bare loop and a stock Flower app, then optimisers and adapter kinds; idle, half an hour
	$(BIN)/python -m experiments.benchmarks.engine
	$(BIN)/python -m experiments.benchmarks.methods --json experiments/benchmarks/results/methods.json

bench-deployment: $(STAMP)  ## seconds a round on a federation of real processes; on an idle machine, a quarter of an hour
	$(BIN)/python -m experiments.benchmarks.deployment

bench-gpu: $(STAMP)  ## local training on this machine's GPU, models at random, no network; under 8 minutes
	$(BIN)/python -m experiments.benchmarks.gpu

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:  ## remove what runs and builds left behind
	rm -rf runs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

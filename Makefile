# `make` alone says what there is. Every goal sets up what it needs first: a virtual environment in
# .venv with exactly the versions of requirements.lock. Needs Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
LINT_READY := $(VENV)/.ready-lint
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
# The lock files name every package and the hashes of its files; pip takes nothing else.
LOCKED := --require-hashes --no-deps

# pytest: one process a core pays only where a core has about 2 GB of memory.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-federation test fast faults soak lint lint-deploy format types check bench lock lock-hashes advisories clean

help: ## this list
	@echo 'medfl: federated learning that hospitals run'
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | while IFS=@ read -r goal text; do printf '%-20s %s\n' "$$goal" "$$text"; done

demo: $(RUN_READY) ## three hospitals train one model on this machine; ends with a report
	$(BIN)/medfl-simulate demo

demo-federation: $(RUN_READY) ## the same by separate processes: coordinator, hospitals, TLS, consent
	$(BIN)/medfl-simulate demo-federation

test: $(DEV_READY) ## every test
	OMP_NUM_THREADS=1 $(PYTEST)

fast: $(DEV_READY) ## the tests that take less than a few seconds each
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow'

faults: $(DEV_READY) ## every case of the fault campaign; writes tests/faults/RESULTS.md
	MEDFL_FAULTS=1 MEDFL_FAULTS_TABLE=tests/faults/RESULTS.md OMP_NUM_THREADS=1 \
	    $(PYTEST) tests/faults/test_long_cut.py tests/faults $$($(BIN)/python tests/faults/harness/cases.py)

soak: $(DEV_READY) ## 300 rounds under faults thrown at random; writes tests/faults/SOAK.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py --out tests/faults/SOAK.md

lint: $(DEV_READY) ## ruff: faults and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-deploy: $(LINT_READY) ## units, image, compose file, chart and proxy in deploy/ (Debian's tools)
	deploy/lint.sh $(BIN)/python

format: $(DEV_READY) ## let ruff mend format and simple faults
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_READY) ## mypy, strict
	$(BIN)/mypy

check: ## lint, types and every test: run it before you hand anything in
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory test

bench: $(RUN_READY) ## measure speed and memory against Flower; dated files in simulations/benchmarks/results
	$(BIN)/python -m medfl.simulations.benchmarks all --out simulations/benchmarks/results

setup: $(DEV_READY) ## install everything, run nothing

lock: ## choose the newest versions that pyproject.toml allows and write the lock files
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	deploy/install-torch.sh $(VENV)-lock/bin/python
	$(VENV)-lock/bin/python -m pip install --quiet '.[dev,flower-simulation]' packaging
	$(VENV)-lock/bin/python deploy/lock.py
	rm -rf $(VENV)-lock build

lock-hashes: $(RUN_READY) ## after a pin was added by hand: its hashes, and the list of parts (SBOM)
	$(BIN)/python deploy/lock.py --keep

advisories: $(RUN_READY) ## pins against a folder of OSV advisories: make advisories MEDFL_OSV=FOLDER
	@MEDFL_OSV=$(MEDFL_OSV) $(BIN)/python deploy/advisories.py

clean: ## remove the environment and everything that was made, except runs/
	rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "medfl needs Python 3.11 or newer and $(PYTHON) is not; name one: make PYTHON=python3.11 ..."; \
	    exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; \
	    exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): requirements.lock requirements-torch.lock pyproject.toml deploy/install-torch.sh | $(BIN)/pip
	@deploy/install-torch.sh $(BIN)/python
	@echo 'installing the packages of requirements.lock (about a minute)'
	@$(PIP) $(LOCKED) -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_READY): requirements-dev.lock $(RUN_READY)
	@echo 'installing the packages of requirements-dev.lock'
	@$(PIP) $(LOCKED) -r requirements-dev.lock
	@touch $@

$(LINT_READY): deploy/requirements-lint.lock $(DEV_READY)
	@echo 'installing the packages of deploy/requirements-lint.lock'
	@$(PIP) $(LOCKED) -r deploy/requirements-lint.lock
	@touch $@

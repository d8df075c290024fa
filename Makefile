# The commands of the README. Each sets up what it needs, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help up test test-browser test-clients chaos check format bench bench-quick lock clean

help: ## tell this
	@awk -F ': .*## ' '/^[a-z-]+: .*## / { printf "make %-12s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(VENV)/installed ## Redis, API and worker, at http://127.0.0.1:8000
	@exec $(BIN)/python -m cli up

test: $(VENV)/installed-dev ## everything but the browser and the clients
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --cov --cov-report=term:skip-covered

test-clients: $(VENV)/installed-browser ## every client; needs Node 20 with npm, and Chromium
	cd tests/clients && npm ci --no-audit --no-fund --loglevel=error
	$(BIN)/python -m pytest -m clients

test-browser: $(VENV)/installed-browser ## the page in a headless Chromium
	$(BIN)/python -m pytest -m browser

chaos: $(VENV)/installed-dev ## faults at random over the real stack, and a checker; two minutes
	$(BIN)/python -m chaos $(CHAOS)

check: $(VENV)/installed-dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev ## by ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Some of those need npm or apt-get; without them they are left out.
bench: $(VENV)/installed-dev ## the relay beside other ways of doing it, some 15 minutes
	$(BIN)/python -m bench

bench-quick: $(VENV)/installed-dev ## the least of that, in 90 s; fails where a ratio has collapsed
	$(BIN)/python -m bench --quick

lock: $(VENV)/installed-dev ## pin the requirements anew
	sh requirements/lock.sh $(BIN)

clean: ## remove the environment and the data of make up
	rm -rf $(VENV) .relay

# Made anew also where its Python is gone, as after an upgrade. Where venv fails it may have made
# bin/python, by which the next make would take it for whole.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'chat-relay needs Python 3.11 or newer: make PYTHON=python3.12 ...'; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo 'This Python cannot make an environment: apt-get install python3-venv'; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV) 2>/dev/null; exit 2; }

# The last stamp wins: each set of requirements holds the one before it.
$(VENV)/installed: requirements/run.txt pyproject.toml | $(VENV)/bin/python
	@echo 'Setting up $(VENV) ...'
	@$(PIP) install --require-hashes -r requirements/run.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-dev: requirements/dev.txt $(VENV)/installed
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

$(VENV)/installed-browser: requirements/browser.txt $(VENV)/installed-dev
	@$(PIP) install --require-hashes -r requirements/browser.txt
	@touch $@

# The commands of the README. Each sets up what it needs, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: up test test-browser test-clients chaos check format bench bench-quick lock clean

up: $(VENV)/installed
	@exec $(BIN)/relay up

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

# Needs Node 20 or newer, with npm, and Chromium.
test-clients: $(VENV)/installed-browser
	cd tests/clients && npm ci --no-audit --no-fund --loglevel=error
	$(BIN)/python -m pytest -m clients

test-browser: $(VENV)/installed-browser
	$(BIN)/python -m pytest -m browser

# Faults drawn at random over the real stack, and a checker of what everybody saw; two minutes.
chaos: $(VENV)/installed-dev
	$(BIN)/python -m chaos $(CHAOS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The relay beside other ways of doing it, some 15 minutes. Some of those need npm or apt-get;
# without them they are left out.
bench: $(VENV)/installed-dev
	$(BIN)/python -m bench

# Of that the least, in a minute and a half; it fails where a ratio has collapsed.
bench-quick: $(VENV)/installed-dev
	$(BIN)/python -m bench --quick

lock: $(VENV)/installed-dev
	sh requirements/lock.sh $(BIN)

clean:
	rm -rf $(VENV) .relay

# Without ensurepip venv fails after it has made bin/python, by which the next make would take it
# for whole.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'chat-relay needs Python 3.11 or newer: make PYTHON=python3.12 ...'; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); \
	    echo 'This Python cannot make an environment: apt-get install python3-venv'; exit 2; }

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

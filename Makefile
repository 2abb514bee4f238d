# make quickstart | test | lint | clean. Everything happens in .venv, which the first command makes.
# Another Python: make PYTHON=python3.12 test. A subset of the tests: make test PYTEST_ARGS="tests/test_config.py -x".

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
QUICKSTART ?= launch.train --config=configs/quickstart.py
QUICKSTART_DIR ?= runs/quickstart

PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
SOURCES := $(wildcard kdjax launch configs)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "kdjax needs Python 3.11 or newer, %s is %d.%d. Remove $(VENV) if it is there, then: make PYTHON=python3.11 ..." % ((sys.executable,) + tuple(sys.version_info[:2])))
CPU := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install dev quickstart test lint mypy clean

help:
	@echo "make quickstart   install into $(VENV), distil a real language model, write a report"
	@echo "make test         install into $(VENV), lint, types, all tests"
	@echo "make lint         ruff and mypy only"
	@echo "make clean        remove $(VENV) and all caches; runs/ stays"

# An environment that is there and has pip is kept. Debian's python3 may lack ensurepip: then its own pip goes inside.
$(STAMPS)/venv:
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c '$(CHECK)' && echo "== making $(VENV)" && rm -rf $(VENV) \
	  && { $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; } \
	    || { echo "$(PYTHON) makes no virtual environment with pip; install its venv module." >&2; exit 1; }; }; }
	@$(PY) -c '$(CHECK)'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/core: $(STAMPS)/venv requirements.txt
	@echo "== installing requirements.txt (about two minutes, once)"
	@$(PIP) -r requirements.txt >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv requirements.txt requirements-dev.txt
	@echo "== installing requirements-dev.txt (about three minutes, once; 200 MB of it is the TPU compiler)"
	@$(PIP) -r requirements-dev.txt >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $(STAMPS)/core $@

venv: $(STAMPS)/venv
install: $(STAMPS)/core
dev: $(STAMPS)/dev

quickstart: install
	@$(PY) -m $(QUICKSTART) --workdir=$(QUICKSTART_DIR)
	@test -d $(QUICKSTART_DIR)/student \
	  || $(PY) -m launch.export_hf --workdir=$(QUICKSTART_DIR) --out=$(QUICKSTART_DIR)/student

lint: dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(MAKE) --no-print-directory mypy

mypy: dev
	@$(PY) -m mypy $(SOURCES)

test: lint
	@$(PY) -c 'import torch' 2>/dev/null || { \
	  echo "== no torch in $(VENV): the parity tests that compare with it are skipped."; \
	  echo "   On Python 3.11: $(PY) -m pip install torch==2.13.0"; }
	@$(CPU) $(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# make quickstart | test | lint | clean. Everything happens in .venv, which the first command makes.
# Another Python: make PYTHON=python3.12 test. A subset of the tests: make test PYTEST_ARGS="tests/test_config.py -x".

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
QUICKSTART ?= launch.train --config=configs/quickstart.py --workdir=runs/quickstart

PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
SOURCES := $(wildcard kdjax launch configs)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
CPU := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install dev quickstart test lint mypy clean

help:
	@echo "make quickstart   install into $(VENV), distil a real language model, write a report"
	@echo "make test         install into $(VENV), lint, types, all tests"
	@echo "make lint         ruff and mypy only"
	@echo "make clean        remove $(VENV) and all caches; runs/ stays"

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "kdjax needs Python 3.11 or newer, $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11 ..." % v[:2])'
	@echo "== making $(VENV)"
	@# Debian's python3 may lack ensurepip: then pip from outside puts pip inside.
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; } \
	  || { echo "$(PYTHON) can make no virtual environment; install its venv module or pip." >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/core: $(STAMPS)/venv requirements.txt
	@echo "== installing requirements.txt (about two minutes, once)"
	@$(PIP) -r requirements.txt >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv requirements.txt requirements-dev.txt
	@echo "== installing requirements-dev.txt (about two minutes, once)"
	@$(PIP) -r requirements-dev.txt >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $(STAMPS)/core $@

venv: $(STAMPS)/venv
install: $(STAMPS)/core
dev: $(STAMPS)/dev

quickstart: install
	@$(PY) -m $(QUICKSTART)

mypy: dev
	@$(PY) -m mypy $(SOURCES)

lint: mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

test: lint
	@$(PY) -c 'import torch' 2>/dev/null || echo "== no torch in $(VENV): the parity tests against torch are skipped (on Python 3.11: $(PY) -m pip install torch==2.13.0)"
	@$(CPU) $(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

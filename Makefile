# make train   the default run: embedded language model and text, no network after the installation
# make test    the whole test suite          make check   what CI runs: format, lint, types, tests
PYTHON ?= python3
VENV := .venv
PIP_ARGS ?=
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
ARGS ?=

.PHONY: train test lint types check clean

train: $(VENV)/.installed
	$(VENV)/bin/jsae-train $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check jsae_lightning tests
	$(VENV)/bin/ruff format --check jsae_lightning tests

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

check: lint types test

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist

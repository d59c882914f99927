# make train   the default run: embedded language model and text, no network after the installation
# make test    the test suite                make test-slow   the slow tests: killed ranks, sweeps, a real Slurm
# make check   format, lint, types, tests    (continuous integration runs make check and make test-slow)
PYTHON ?= python3
VENV := .venv
PIP_ARGS ?=
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS)
ARGS ?=

.PHONY: train test test-slow lint types check clean

train: $(VENV)/.installed
	$(VENV)/bin/jsae-train $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check jsae_lightning tests notebooks
	$(VENV)/bin/ruff format --check jsae_lightning tests notebooks

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

check: lint types test

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	touch $@

# One installation, not that of .installed and another: pip would look for every package twice.
$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist

# `make quickstart` and `make test` are all that a fresh machine with Python and make needs.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test
quickstart: .venv/installed
	$(PY) -m headstart quickstart

test: .venv/installed-dev
	scripts/check
	$(PY) -m pytest -n 2 --dist worksteal

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

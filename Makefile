# `make quickstart` and `make test` are all that a fresh machine with Python and make needs.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-vllm
quickstart: .venv/installed
	$(PY) -m headstart quickstart

test: .venv/installed-dev
	scripts/check
	$(PY) -m pytest -n 2 --dist worksteal

# A real vLLM server in an environment of its own, whose pins never fit the trainer's: 2.5 GB, then seven to ten minutes.
test-vllm: .venv/installed-dev .venv-vllm/installed
	HEADSTART_VLLM=.venv-vllm/bin/python $(PY) -m pytest tests/vllm

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

.venv-vllm/installed: tests/vllm/constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

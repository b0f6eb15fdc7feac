# Two commands: `make train` and `make test`. Each makes .venv and installs by itself; Python 3.11+ is all it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-full test-gpu lint clean

train: .venv/installed
	$(BIN)/helixpipe train

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# every combination of which `make test` runs a covering subset: more than an hour
test-full: .venv/installed
	$(BIN)/python -m pytest -m full

# needs a CUDA device
test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "helixpipe needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs

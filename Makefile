# Everything a fresh machine with Python 3.11 and pip needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

.PHONY: demo test check bench docs clean

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(SETUP)

demo: $(SETUP)  ## train four kinds of model on real text and compare them
	$(BIN)/plait demo

test: $(SETUP)  ## the laws and everything else, on the CPU
	$(BIN)/python -m pytest -n 2 tests

check: $(SETUP)  ## format, lint, import order, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(SETUP)  ## speed and memory beside transformers, in one process
	$(BIN)/python benchmarks/cpu_models.py --out benchmarks/results/cpu_models.json
	$(BIN)/python benchmarks/memory.py --out benchmarks/results/memory.json

docs: $(SETUP)  ## the pages the code writes: layers, presets, commands
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) runs

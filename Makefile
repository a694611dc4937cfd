# make demo: install into .venv and run the notebooks on synthetic data.   make test: the quick tests.
# make bench: measure what benchmarks/results.md claims, in an environment of its own, as the peers are large.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test slow lint bench clean

demo: .venv/installed
	$(BIN)/kerasmed run all --profile demo

test: .venv/dev
	$(PYTEST)

slow: .venv/dev
	$(PYTEST) -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@

bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/run.py

.venv-bench/installed: requirements.txt requirements-bench.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement requirements-bench.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-bench data/.cache

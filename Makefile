# make demo: install into .venv and run the notebooks on synthetic data.   make test: the quick tests.
# make reliability: run the tests of reliability and write docs/reliability.md from what they saw.
# make bench: measure what benchmarks/results.md claims, in an environment of its own, as the peers are large.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two processes at once, of a thread each and a file in one of them; what measures time comes after, alone.
TOGETHER := TF_NUM_INTRAOP_THREADS=1 OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile

.PHONY: demo test slow backends lint reliability bench clean

demo: .venv/installed
	$(BIN)/kerasmed run all --profile demo

test: .venv/dev
	$(TOGETHER) -m "not slow and not timed"
	$(PYTEST) -m "timed and not slow"

# In the order of tests/conftest.py, the longest first.
slow: .venv/dev
	$(TOGETHER) --no-loadscope-reorder -m "slow and not timed"
	$(PYTEST) -m "timed and slow"

UNDER_JAX := training modalities backbones layers losses models fusion gradcam batches
# Most of their time would be XLA's; many tests build the same small network.
QUICK_JAX := JAX_DISABLE_MOST_OPTIMIZATIONS=true JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/compiled \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# Tests of these modules under JAX; then what compares backends and devices, with PyTorch where it is installed.
backends: .venv/jax
	KERAS_BACKEND=jax $(QUICK_JAX) $(TOGETHER) --no-loadscope-reorder -m "not slow and not timed" $(UNDER_JAX:%=tests/test_%.py)
	$(TOGETHER) -m "" -k "jax or torch" tests/test_backends.py tests/test_devices.py tests/test_environment.py

reliability: .venv/dev
	rm -rf .reliability
	KERASMED_RELIABILITY=$(CURDIR)/.reliability $(PYTEST) tests/reliability -m ""
	$(BIN)/python -m tests.reliability.table .reliability

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

.venv/jax: .venv/dev
	$(BIN)/python -m pip install --quiet --editable .[jax]
	touch $@

bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/run.py

.venv-bench/installed: requirements.txt requirements-bench.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --requirement requirements-bench.txt --editable .
	touch $@

clean:
	rm -rf .venv .venv-bench data/.cache

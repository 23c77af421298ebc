# Every target makes what it needs and can be run again cheaply.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export VLLM_TARGET_DEVICE ?= cpu

.PHONY: help demo test test-fast lint docs bench bench-faithfulness clean

help:
	@echo "make demo   ask a small real model a question and see where its answer came from"
	@echo "make test   lint, type-check and run all tests"
	@echo "make docs   the documentation, in site/"
	@echo "make bench  small benchmarks"
	@echo "make bench-faithfulness  do the scores find where answers come from? a small subset"

# The lock is installed without dependency resolution; see the note at its top.
$(VENV)/.cpu: requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.cpu requirements/dev.txt requirements/scale.txt
	$(PIP) install --quiet --no-deps -r requirements/dev.txt -r requirements/scale.txt
	touch $@

demo: $(VENV)/.cpu
	$(BIN)/vllm-flashtrace demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/vllm-flashtrace demo --model-path
	$(BIN)/python -m pytest -q

$(VENV)/.docs: $(VENV)/.dev requirements/docs.txt
	$(PIP) install --quiet --no-deps -r requirements/docs.txt
	touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q --ignore tests/engine --ignore tests/serving

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.trace_latency --eager
	$(BIN)/python -m benchmarks.parity --tokens 600
	$(BIN)/python -m benchmarks.vs_reference --eager --cases 600,200,20
	$(BIN)/python -m benchmarks.scaling --eager --quick

bench-faithfulness: $(VENV)/.dev
	mkdir -p .cache
	$(BIN)/python -m benchmarks.faithfulness --preset quick --json .cache/faithfulness-quick.json

clean:
	rm -rf $(VENV) build site *.egg-info

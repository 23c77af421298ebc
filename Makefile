# Every target makes what it needs and can be run again cheaply.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Processes of the test suite, one more than cores since servers and Ray are often waited for; each
# keeps engines of its own, together about 12 GiB.
JOBS ?= 3
PYTEST_PARALLEL := -n $(JOBS) --dist loadscope --no-loadscope-reorder
export VLLM_TARGET_DEVICE ?= cpu
# Every process of the suite would compile all of its modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-long check-vllm coverage lint docs bench bench-faithfulness clean

help:
	@echo "make demo   ask a small real model a question and see where its answer came from"
	@echo "make test   lint, type-check, build the documentation and run the tests"
	@echo "make test-long  what make test leaves to releases: tests marked long, fuzzing, mixed load"
	@echo "make check-vllm VERSION=0.33.0   does another vLLM have the interfaces that the patches rely on?"
	@echo "make coverage   the tests with branch coverage, processes that they start included"
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

# mypy sees the package as it is installed, with patches/ in it.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/vllm_flashtrace
	ln -s $(CURDIR)/vllm_flashtrace/* $(CURDIR)/patches build/types/vllm_flashtrace/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p vllm_flashtrace

test: lint docs
	$(BIN)/vllm-flashtrace demo --model-path
	$(BIN)/python -m pytest -q $(PYTEST_PARALLEL) --durations=10

# What a release is tested with besides: the tests marked `long`, more fuzzed requests, a mixed load.
test-long: lint
	$(BIN)/vllm-flashtrace demo --model-path
	$(BIN)/python -m pytest -q -m long $(PYTEST_PARALLEL) --durations=10
	FLASHTRACE_FUZZ_SCALE=12 $(BIN)/python -m pytest -q tests/server/test_fuzz.py --timeout 3600
	$(BIN)/python -m benchmarks.mixed_load

check-vllm: $(VENV)/.dev
	$(BIN)/python -m tests.patches.signatures $(or $(VERSION),$(error give a version: make check-vllm VERSION=0.33.0))

# Processes of the package that the tests start are measured too.
coverage: $(VENV)/.dev
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -q $(PYTEST_PARALLEL) --timeout 900
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered

$(VENV)/.docs: $(VENV)/.dev requirements/docs.txt
	$(PIP) install --quiet --no-deps -r requirements/docs.txt
	touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q --ignore tests/engine --ignore tests/server --ignore tests/scale

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

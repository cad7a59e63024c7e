# `make demo` and `make test` need Python 3.11 or newer, pip and make; they install the rest into
# .venv. Once installed, nothing here uses the network until pyproject.toml or constraints.txt change.

PYTHON ?= python3
# Which torch: any way of writing 2.13 that pip accepts, for example a wheel's file name.
TORCH ?= torch==2.13.0
# More arguments for pytest: make test PYTEST_ARGS="-n 2 tests/engine"
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# CI runs the slow tests too: by two processes, of which one begins with all that start a Ray cluster,
# and each takes whole files; then by one those that measure time.
ifneq ($(filter-out 0 false,$(CI)),)
test: test-in-ci
else
test: test-by-default
endif

BY_TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Where `make comparison` puts drafters and figures, and where the sets of prompts are.
OUT ?= /tmp/comparison
PROMPTS ?= ../shared/data/prompts
COMPARED := dflash-2 dflash-5 dspark-2 dspark-2-rnn dspark-5-rnn eagle3

.PHONY: help install demo comparison test test-by-default test-in-ci test-all lint format \
  protos protos-check chart chart-check docs docs-check lock clean

help:
	@echo 'make demo          start a small cluster here, use it, compare outputs, stop it'
	@echo 'make comparison    docs/comparison.md again: six drafters trained (hours), then compared'
	@echo 'make test          the default tests; in CI the slow ones too'
	@echo 'make test-all      the slow tests too; with PYTEST_ARGS=--full in their largest form: hours'
	@echo 'make lint          style, types, layers, generated code'
	@echo 'make format        put the code into the style that lint asks for'
	@echo 'make protos        regenerate cluster/v1 from protos/'
	@echo 'make chart         regenerate parts of helm/dspark from deployments/ and cluster/config.py'
	@echo 'make docs          regenerate docs/reference from protos/ and the code'
	@echo 'make install       the virtual environment; the other targets do this when needed'
	@echo 'make lock          write the versions in .venv to constraints.txt'
	@echo 'make clean         remove caches and builds; .venv stays'

install: $(STAMP)

# torch comes first and by itself, so that whoever wants another build of it names it in one place.
# No build isolation: building the editable package then needs no download of its own.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    test -x $(BIN)/python || $$python -m venv .venv; exit; \
	  fi; \
	done; echo 'No Python 3.11 or newer found: name one with PYTHON=/path/to/python.' >&2; exit 1
	$(PIP) install --constraint constraints.txt '$(TORCH)' setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/dspark demo

comparison: $(STAMP)
	for name in $(COMPARED); do \
	  $(BIN)/dspark train deployments/training/$$name.yaml --set output.folder=$(OUT)/$$name || exit 1; \
	done
	$(BIN)/dspark bench drafters --out $(OUT) --prompts 64 --data stdlib-heldout \
	  --data $(PROMPTS)/humaneval.jsonl --data $(PROMPTS)/mbpp.jsonl \
	  --drafter dflash-2=dflash:$(OUT)/dflash-2 --drafter dflash-5=dflash:$(OUT)/dflash-5 \
	  --drafter dspark-2=dspark:$(OUT)/dspark-2 --drafter dspark-2-rnn=dspark:$(OUT)/dspark-2-rnn \
	  --drafter dspark-5-rnn=dspark:$(OUT)/dspark-5-rnn --drafter eagle-3=eagle3:$(OUT)/eagle3 \
	  --drafter ngram --baseline eagle-3 --baseline dspark-2 --baseline dflash-5

test-by-default: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-in-ci: $(STAMP)
	$(BIN)/python -m pytest --run-slow -m 'not timed' $(BY_TWO) $(PYTEST_ARGS)
	$(BIN)/python -m pytest --run-slow -m timed $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest --run-slow $(PYTEST_ARGS)

lint: $(STAMP) protos-check chart-check docs-check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(STAMP)
	$(BIN)/python protos/generate.py

protos-check: $(STAMP)
	$(BIN)/python protos/generate.py --check

chart: $(STAMP)
	$(BIN)/python helm/generate.py

chart-check: $(STAMP)
	$(BIN)/python helm/generate.py --check

docs: $(STAMP)
	$(BIN)/python docs/generate.py

docs-check: $(STAMP)
	$(BIN)/python docs/generate.py --check

# The suffix of a local build (torch 2.13.0+cpu) is dropped: any build of that version will do.
lock: $(STAMP)
	@{ grep '^#' constraints.txt; \
	   $(PIP) freeze --all --exclude-editable | sed -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//'; \
	} > .venv/constraints.new
	@cp .venv/constraints.new constraints.txt && touch $(STAMP)

clean:
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find cluster protos tests -type d -name __pycache__ -prune -exec rm -rf '{}' +

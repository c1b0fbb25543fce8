# Needs python3 (3.10 or newer), make and git; everything else goes into .venv, here in this folder.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# Not the GPU plugin: its faiss wheel and the CPU plugin's overwrite each other's files.
PLUGINS := $(filter-out plugins/expbuf_faiss_gpu,$(patsubst %/,%,$(dir $(wildcard plugins/*/pyproject.toml))))
PACKAGES := expbuf_core $(foreach plugin,$(PLUGINS),$(plugin)/$(notdir $(plugin)))
# Always one command: a plugin alone would look for expbuf-core on the package index.
EDITABLE := $(foreach plugin,$(PLUGINS),-e $(plugin))
PYPROJECTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo setup test test-long check format coverage bench bench-quick clean

help:
	@echo "make demo       watch an agent learn, get killed, come back and go on"
	@echo "make test       the quick tests; ARGS='-k name' passes options to pytest"
	@echo "make test-long  all tests, the long ones too"
	@echo "make check      lint, format, types, layering"
	@echo "make format     format, and fix what the linter can fix"
	@echo "make coverage   the quick tests with branch coverage"
	@echo "make bench      the benchmarks (an hour, 30 GB of disk); bench-quick: some minutes"
	@echo "make clean      remove what was built, .venv too"

demo: .venv/demo.stamp
	@$(BIN)/python examples/digits/demo.py $(ARGS)

setup: .venv/dev.stamp ;@:

test: .venv/dev.stamp
	@$(BIN)/python -m pytest $(ARGS)

test-long: .venv/dev.stamp
	@EXPBUF_LONG=1 $(BIN)/python -m pytest --timeout=3600 -o faulthandler_timeout=1800 $(ARGS)

check: .venv/dev.stamp
	@status=0; \
	run() { echo "$$*"; output=$$($(BIN)/"$$@" 2>&1) || { status=1; echo "$$output"; }; }; \
	run ruff check .; \
	run ruff format --check .; \
	run mypy $(PACKAGES); \
	run lint-imports --no-cache; \
	exit $$status

format: .venv/dev.stamp
	@$(BIN)/ruff check --quiet --fix .; $(BIN)/ruff format .

coverage: .venv/dev.stamp
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage report --skip-covered --show-missing

# Peers are optional: what .venv has takes part.
bench: .venv/dev.stamp
	@for name in storage search sampling; do \
		$(BIN)/python -m benchmarks.$$name --json benchmark_output/$$name.json $(ARGS) || exit 1; \
	done

bench-quick:
	@$(MAKE) --no-print-directory bench ARGS="--quick $(ARGS)"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "expbuf needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: the package python3-venv)"; exit 1; }

# A stamp says what .venv was set up for; a changed pyproject.toml makes it stale.
.venv/demo.stamp: $(PYPROJECTS) | .venv/bin/python
	@echo "Setting up .venv for the demo (once; about a minute)"
	@$(BIN)/python -m pip install --quiet -e ".[demo]" $(EDITABLE)
	@touch $@

.venv/dev.stamp: $(PYPROJECTS) | .venv/bin/python
	@echo "Setting up .venv for development (once; about a minute)"
	@$(BIN)/python -m pip install --quiet -e ".[dev]" $(EDITABLE)
	@touch $@ .venv/demo.stamp

clean:
	@rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis \
		.coverage demo_output benchmark_output
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Clean"

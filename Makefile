# Needs python3 (3.10 or newer), make and git; everything else goes into .venv, here in this folder.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# The GPU plugin comes without its FAISS wheel, which and the CPU's overwrite each other's files.
GPU := plugins/expbuf_faiss_gpu
PLUGINS := $(filter-out $(GPU),$(patsubst %/,%,$(dir $(wildcard plugins/*/pyproject.toml))))
PACKAGES := expbuf_core $(foreach plugin,$(PLUGINS) $(GPU),$(plugin)/$(notdir $(plugin)))
# Always one command: a plugin alone would look for expbuf-core on the package index.
EDITABLE := $(foreach plugin,$(PLUGINS),-e $(plugin))
PYPROJECTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml) $(GPU)/pyproject.toml
# Compiled with the package; see expbuf_core/native.
NATIVE := hatch_build.py $(wildcard expbuf_core/native/*.[ch])

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo setup compiled test test-long test-gpu-wheel check format coverage bench bench-quick bench-peers bench-docs docs clean

help:
	@echo "make demo       watch an agent learn, get killed, come back and go on"
	@echo "make test       the quick tests; ARGS='-k name' passes options to pytest"
	@echo "make test-long  all tests, the long ones too"
	@echo "make test-gpu-wheel  the FAISS plugins on the wheel for GPUs, in .venv-gpu (2 GB)"
	@echo "make check      lint, format, types, layering"
	@echo "make format     format, and fix what the linter can fix"
	@echo "make coverage   the quick tests with branch coverage"
	@echo "make bench      all benchmarks (75 minutes, 40 GB of disk), and docs/benchmarks.md anew"
	@echo "make bench-quick  the same at small sizes (five minutes), into benchmark_output/"
	@echo "make bench-peers  install what is compared with, into .venv-peers (some GB)"
	@echo "make bench-docs   docs/benchmarks.md and its pictures from benchmarks/results.json"
	@echo "make docs       the documents as a site: site/index.html"
	@echo "make clean      remove what was built, .venv too"

demo: .venv/demo.stamp
	@$(BIN)/python examples/digits/demo.py $(ARGS)

setup: compiled ;@:

# Hundreds of processes that tests start import this; also where Python itself may write no bytecode.
compiled: .venv/dev.stamp
	@$(BIN)/python -m compileall -q $(PACKAGES)

# Several at once; ARGS='-n 0' for one behind the other, as in a debugger.
test: compiled
	@$(BIN)/python -m pytest -n auto --maxprocesses=4 $(ARGS)

test-long: compiled
	@EXPBUF_LONG=1 $(BIN)/python -m pytest --timeout=3600 -o faulthandler_timeout=1800 $(ARGS)

# On a machine without a GPU this tries out the fallbacks; with one, see docs/gpu.md, too.
test-gpu-wheel: .venv-gpu/stamp
	@.venv-gpu/bin/python -m pytest $(GPU)/tests plugins/expbuf_faiss/tests $(ARGS)

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

coverage: compiled
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage report --skip-covered --show-missing

# Peers are optional: what .venv-peers has takes part.
bench: .venv/dev.stamp
	@$(BIN)/python -m benchmarks --publish $(ARGS)

bench-quick: .venv/dev.stamp
	@$(BIN)/python -m benchmarks --quick $(ARGS)

# Line by line: a peer that cannot be installed here keeps no other away.
bench-peers:
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@grep -v '^#' benchmarks/requirements-peers.txt | while read -r peer; do \
		.venv-peers/bin/python -m pip install --quiet $(ARGS) $$peer && echo "$$peer" || echo "$$peer: skipped, pip could not install it"; \
	done

bench-docs: .venv/dev.stamp
	@$(BIN)/python -m benchmarks.plots benchmarks/results.json --to docs/images
	@$(BIN)/python -m benchmarks.document

# Strict: a link that leads nowhere, or a page outside the navigation, fails. (--quiet would undo it.)
docs: .venv/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "site/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "expbuf needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: the package python3-venv)"; exit 1; }

# A stamp says what .venv was set up for; a changed pyproject.toml makes it stale.
.venv/demo.stamp: $(PYPROJECTS) $(NATIVE) | .venv/bin/python
	@echo "Setting up .venv for the demo (once; about a minute)"
	@$(BIN)/python -m pip install --quiet -e ".[demo]" $(EDITABLE)
	@touch $@

.venv/dev.stamp: $(PYPROJECTS) $(NATIVE) | .venv/bin/python
	@echo "Setting up .venv for development (once; about a minute)"
	@$(BIN)/python -m pip install --quiet -e ".[dev]" $(EDITABLE)
	@$(BIN)/python -m pip install --quiet --no-deps -e $(GPU)
	@touch $@ .venv/demo.stamp

.venv-gpu/stamp: $(PYPROJECTS) $(NATIVE)
	@echo "Setting up .venv-gpu (once; downloads 1 GB)"
	@test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install --quiet -e ".[testing]" -e plugins/expbuf_file \
		-e plugins/expbuf_faiss -e $(GPU) "pytest-timeout>=2.3"
	@touch $@

.venv/docs.stamp: $(PYPROJECTS) $(NATIVE) | .venv/bin/python
	@echo "Setting up .venv for the documents (once; about a minute)"
	@$(BIN)/python -m pip install --quiet -e ".[docs]" $(EDITABLE)
	@touch $@

clean:
	@rm -rf site .venv .venv-gpu .venv-peers dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis \
		.coverage demo_output benchmark_output
	@rm -f expbuf_core/native/*.so
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Clean"

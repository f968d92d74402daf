# Two commands do everything on a fresh machine with Python 3.11 or later, make and the package registry:
#   make demo    install, then run the main job on what ships with the package
#   make test    install, then run the tests (make test-all: those that start processes or take long, too)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXECUTORCH ?= .venv-executorch
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=20
SELECT ?= not slow and not process and not browser

.PHONY: help install dev demo docs test test-rest test-all test-processors test-oldest test-newest executorch lint types zoo bench quality finding clean
.DEFAULT_GOAL := help

help:            ## show this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed  ## make the virtual environment with pinned versions

dev: $(VENV)/.installed-dev  ## the same, with what the tests need

demo: install    ## quantize and measure the shipped model on the shipped images; writes quantlens-demo/report.html
	$(BIN)/quantlens demo --out quantlens-demo

test: lint types  ## run the tests (lint and types first)
	$(PYTEST) -m "$(SELECT)"

test-rest: dev   ## run the tests that make test leaves out: slow, process, browser
	$(PYTEST) -m "slow or process or browser"

test-all: test test-rest  ## run all tests

test-processors: dev  ## make test's selection under lower instruction sets and two threads (benchmarks/processors.py)
	$(BIN)/python -m benchmarks.processors --jobs $(JOBS)

test-oldest: .venv-oldest/.installed  ## make test's selection with the oldest versions pyproject.toml allows
	.venv-oldest/bin/python -m pytest -n $(JOBS) --dist worksteal -m "$(SELECT)"

test-newest: .venv-newest/.installed  ## make test's selection with the newest versions there are, not the pinned ones
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist worksteal -m "$(SELECT)"

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q -c constraints-oldest.txt -e '.[dev]'
	touch $@

# Upgraded at every call: what is newest changes without any file here doing so.
.venv-newest/.installed: .FORCE
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check -q -U --upgrade-strategy eager -e '.[dev]'
	touch $@

executorch: $(EXECUTORCH)/.installed  ## make the environment of examples/executorch, whose pins are not ours

$(EXECUTORCH)/.installed: examples/executorch/requirements.txt
	test -x $(EXECUTORCH)/bin/python || $(PYTHON) -m venv $(EXECUTORCH)
	$(EXECUTORCH)/bin/python -m pip install --disable-pip-version-check -q -r examples/executorch/requirements.txt
	touch $@

.FORCE:

lint: dev        ## lint and format check
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check -q src tests benchmarks docs

types: dev       ## type check
	$(BIN)/mypy

docs: dev        ## build the documentation into site/ (a broken link fails); open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

zoo: install     ## train the shipped model again (about 15 minutes on one core)
	$(BIN)/python -m quantlens.zoo.train digits-vit

bench: dev       ## timed comparisons, as ratios (benchmarks/README.md)
	$(BIN)/python -m benchmarks

quality: dev     ## what methods are worth, medians over seeds against bounds (benchmarks/quality/README.md)
	$(BIN)/python -m benchmarks.quality

finding: dev     ## draw the figures of docs/training-factors.md and print its page, from the committed results
	$(BIN)/python docs/finding.py

clean:           ## remove what make made
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-executorch quantlens-demo site build dist .pytest_cache .mypy_cache .ruff_cache

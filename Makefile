# Every target builds .venv first. Python 3.11 or newer is all that must be installed.
PYTHON ?= python3
BIN := .venv/bin

# Tests run on two processes; tests that share a module's fixtures stay on the same one. By default
# the files with the fewest tests come last, which are long ones, and one process waits for the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# LLAMAPRO_SHARED may name a folder of real weights and tokenizers. The tests use what is there,
# and the study adds its small trained model as a second base.
SECOND := $(if $(LLAMAPRO_SHARED),$(wildcard $(LLAMAPRO_SHARED)/checkpoints/tinystories-1m))

.DEFAULT_GOAL := help
.PHONY: help demo smollm study smollm-study test test-all gpu lint format imports docs clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: .venv/ready  ## train a base, expand it, train its new blocks: about 5 minutes on 2 cores
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/demo.sh

smollm: .venv/ready  ## teach SmolLM2-135M German labels: 15 minutes on 2 cores, and a download
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/smollm.sh

study: .venv/ready  ## run the paper's comparisons: about an hour on 2 cores
	$(if $(SECOND),[ -d study-out/bases/tinystories ] || $(BIN)/python convert.py from-meta \
		$(SECOND) study-out/bases/tinystories)
	$(BIN)/python experiments/study.py $(if $(SECOND),--more-bases tinystories=study-out/bases/tinystories)

smollm-study: .venv/ready  ## the comparisons on SmolLM2-135M: about 10 hours on 2 cores; continues where it stopped
	PATH="$(CURDIR)/$(BIN):$$PATH" bash experiments/smollm.sh

test: lint  ## lint, types and every test that is not marked slow
	$(PYTEST)

test-all: lint  ## the same, with the slow tests
	$(PYTEST) -m 'not gpu and not ecosystem'

gpu: .venv/ready  ## on a GPU: its tests, then kernels and a step timed, in 25 minutes; ARGS="--only step"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: .venv/ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready  ## format the code and fix what ruff can fix by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

imports: .venv/ready  ## print the order of imports: rooms, modules, floors, circles, arrows up
	$(BIN)/python tests/imports.py

docs: .venv/ready  ## make a site of docs/ in build/site, check its links, run its commands
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/python docs/make_settings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -q tests/test_readme.py

clean:  ## remove the environment and every cache, but no run and no checkpoint
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true  # pip takes one core
	touch $@

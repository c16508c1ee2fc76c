# make demo | make study | make test | make lint: each builds .venv first, from nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin

# A trained model to study beside the small one, in Meta's layout, where there is one.
SHARED ?= ../shared
SECOND := $(wildcard $(SHARED)/checkpoints/tinystories-1m)

.PHONY: demo study test lint clean
demo: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/demo.sh

study: .venv/ready
	$(if $(SECOND),[ -d study-out/bases/tinystories ] || $(BIN)/python convert.py from-meta \
		$(SECOND) study-out/bases/tinystories)
	$(BIN)/python experiments/study.py $(if $(SECOND),--more-bases tinystories=study-out/bases/tinystories)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Two commands work on a fresh machine with nothing but Python 3.11+: `make demo` and `make test`.
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.rankloom-installed
PYTHON ?= python3

.PHONY: setup demo test test-all lint docs bench

setup: $(STAMP)

# torch comes first and pinned: a range would resolve to a CUDA build of several GB on a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m rankloom demo --output demo-out

# One process a core: every test computes on one thread.
test: setup
	$(BIN)/python -m pytest -n auto

test-all: setup
	$(BIN)/python -m pytest -n auto -m "slow or not slow"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: setup
	$(BIN)/python -m mkdocs build --strict

bench: setup
	$(BIN)/python bench/step_overhead.py --json bench/results/step_overhead.json
	$(BIN)/python bench/preconditioners.py --json bench/results/preconditioners.json
	$(BIN)/python bench/sketch.py --json bench/results/sketch.json
	$(BIN)/python bench/attach.py --json bench/results/attach.json
	$(BIN)/python bench/init_cost.py --json bench/results/init_cost.json
	$(BIN)/python bench/quantized_base.py --layers 4 --json bench/results/quantized_base.json
	$(BIN)/python bench/gradient_informed.py --json bench/results/gradient_informed.json
	$(BIN)/python bench/limits_speed.py --json bench/results/limits_speed.json
	$(BIN)/python bench/limits_phase.py --json bench/results/limits_phase.json --figure docs/figures/limits_phase.png
	$(BIN)/python bench/limits_training.py --json bench/results/limits_training.json

# Everything runs in a private virtual environment; the only needs are make and Python 3.11 to 3.13.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu sanitize lint bench

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make the virtual environment (CPU build of torch where there is no GPU)

$(READY): pyproject.toml tools/bootstrap.py
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@

demo: $(READY) ## train, compress, reload and judge a small model on this machine (about 5 minutes, no GPU)
	$(BIN)/python examples/demo.py

test: $(READY) ## run the CPU test suite
	$(BIN)/python -m pytest tests -m "not gpu" -n auto --maxprocesses 4 --dist worksteal

test-gpu: $(READY) ## run the tests that need a GPU
	$(BIN)/python -m pytest tests -m gpu

# compilation is part of it, and a race check slows a launch a hundredfold: the tests of all warp-level kernels, ragged
# and whole, and no more
SANITIZED := product_is_right or wide_product or launch_changes_no_decoded
sanitize: $(READY) ## run the kernels under compute-sanitizer, memcheck and racecheck (a GPU and CUDA's tools; 10 minutes)
	for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/kernels/test_gluon.py -m gpu -k "$(SANITIZED)" || exit 1; \
	done

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## gate, then time the codec on this CPU; writes benchmarks/results/codec-cpu.json
	$(BIN)/python -m benchmarks.codec

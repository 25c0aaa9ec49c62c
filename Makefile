# Everything here sets itself up in .venv on a machine that has Python 3.11, pip and make; re-runs are quick.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
VLLM   := $(VENV)/.vllm

.PHONY: help demo test check bench vllm clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first: its CPU build satisfies the pin, and nothing after it asks for another.
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test,postgres,lm-eval]'
	touch $(READY)

vllm: $(VLLM)  ## the production engine: vLLM with the guard's plugin, for the CPU or for an NVIDIA GPU if there is one
$(VLLM): $(READY) deploy/install_vllm.py
	$(BIN)/python deploy/install_vllm.py
	touch $(VLLM)

demo: $(READY)  ## the whole story in the terminal: flag, repair, approve, swap (about fifteen minutes the first time, four after that)
	$(BIN)/headguard demo

test: $(VLLM)  ## every test, the demo and the real vLLM included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## format, lint, types and fast tests, a few minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@# everything under tests/benchmarks is slow: not even collected here
	$(BIN)/python -m pytest -m 'not lab and not slow' -x --no-header --ignore tests/benchmarks

bench: $(READY)  ## detection on the lab's zoo, rendered to docs/ (about an hour on two cores; what is there is kept)
	$(BIN)/python -m benchmarks.detection zoo --window 2 --out build/detection/window-2
	$(BIN)/python -m benchmarks.detection report build/detection/window-2 --out docs/detection.md

clean:  ## remove what was built (models, demo); .venv stays
	rm -rf build

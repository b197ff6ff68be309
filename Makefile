# The two commands of a newcomer are `make run` and `make test`. Both need nothing but Python.
PYTHON ?= python3
VENV ?= .venv
VENV_TEST ?= .venv-test
ARTIFACT ?= dist/kd-resnet18-cpu-int8

# torch is needed by training and its tests alone; this version has a CPU build.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

.PHONY: run test lint setup setup-test clean

run: setup
	$(VENV)/bin/edgehp build --network kd-resnet18 --target cpu --precision int8
	$(VENV)/bin/edgehp validate $(ARTIFACT)
	$(VENV)/bin/edgehp bench $(ARTIFACT)
	$(VENV)/bin/edgehp report $(ARTIFACT)

test: setup-test
	$(VENV_TEST)/bin/python -m pytest $(PYTEST_ARGS)

lint: setup-test
	$(VENV_TEST)/bin/ruff check .
	$(VENV_TEST)/bin/ruff format --check .
	$(VENV_TEST)/bin/mypy

setup: $(VENV)/.done
setup-test: $(VENV_TEST)/.done

# Installed anew when the package's own metadata changes; editable, so that code needs no reinstall.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[build,cpu,report]'
	touch $@

$(VENV_TEST)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_TEST)/bin/python -m pip install --quiet --editable '.[dev,train]' '$(TORCH)'
	touch $@

clean:
	rm -rf $(VENV) $(VENV_TEST) dist build .mypy_cache .ruff_cache .pytest_cache

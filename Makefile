# every target works from a fresh clone: it makes the environment, builds the extension, then does its work.
#
#   make test                           style, types and the tests that are not slow
#   make demo                           trains a flow in 32 and in 16 bits, side by side
#   make experiments                    the published experiments in their CPU or GPU size, for hours, and their report
#   make docs                           the docs site, into site/; make docs-serve shows it
#   make gpu-check OUT=folder           build, benchmarks, all tests, for nine minutes; run again, it goes on
#   make gpu-check VENV= PYTHON=python3 the same with an interpreter that has torch already; no network is used

PYTHON ?= python3
# where the environment is made; empty: PYTHON is used as it is, and only rampde itself is installed into it
VENV ?= .venv
# where benchmarks write; empty: bench/results/<GPU or CPU>
OUT ?=
# what gpu-check does, of: kernels solvers compare tests adaptive memory sanitizer; --again: also what has passed
CHECKS ?= kernels solvers compare tests adaptive memory sanitizer
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

# a test of a backend that must be there fails instead of being skipped
export RAMPDE_REQUIRE ?= $(if $(shell command -v "$${CXX:-c++}"),cpp)

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
INSTALL := -m pip install --no-build-isolation --no-deps --editable .

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
CLANG_FORMAT := clang-format
PYTEST := $(PYTHON) -m pytest
INSTALLED := install-rampde
DOCS_INSTALLED :=
else
RUN := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
PYTEST := $(VENV)/bin/pytest
INSTALLED := $(VENV)/.rampde
DOCS_INSTALLED := $(VENV)/.docs
endif

.PHONY: help install install-rampde test test-all lint format demo bench experiments gpu-check docs docs-serve clean distclean

help:
	@echo "targets: install test test-all lint format demo bench experiments gpu-check docs docs-serve clean distclean"

install: $(INSTALLED)

$(VENV)/.requirements: requirements/dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) \
		else f"rampde needs Python 3.10 or later, $(PYTHON) is {v}: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement $<
	@touch $@

$(VENV)/.rampde: $(VENV)/.requirements $(SOURCES)
	$(RUN) $(INSTALL)
	@touch $@

install-rampde:
	$(RUN) $(INSTALL)

test: $(INSTALLED)
	$(PYTEST) -n $(JOBS) $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(PYTEST) -n $(JOBS) --slow $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PYTEST) tests/test_style.py $(PYTEST_ARGS)

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(wildcard csrc/*.* csrc/*/*.*)

demo: $(INSTALLED)
	$(RUN) examples/cnf.py $(DEMO_ARGS)

bench: $(INSTALLED)
	$(RUN) -m bench.kernels $(if $(OUT),--out $(OUT))
	$(RUN) -m bench.solvers $(if $(OUT),--out $(OUT))
	$(RUN) -m bench.adaptive $(if $(OUT),--out $(OUT))
	$(RUN) -m bench.memory $(if $(OUT),--out $(OUT))
	$(RUN) -m bench.compare $(if $(OUT),--out $(OUT))
	$(RUN) -m bench.accuracy $(if $(OUT),--out $(OUT))

# a run that is there is not repeated, one that was cut off goes on
experiments: $(INSTALLED)
	$(RUN) -m experiments.cnf --density all --seeds 3 --compare
	$(RUN) -m experiments.cnf_gradients
	$(RUN) -m experiments.otflow --dataset miniboone --synthetic --compare
	$(RUN) -m experiments.stl10 --data digits --seeds 3 --compare
	$(RUN) -m experiments.adjoint_scaling
	$(RUN) -m experiments.roundoff --finest 20
	$(RUN) -m experiments.report

gpu-check: $(INSTALLED)
	$(RUN) -m bench.check $(CHECKS) $(if $(OUT),--out $(OUT))

$(VENV)/.docs: requirements/docs.txt $(VENV)/.requirements
	$(RUN) -m pip install --requirement $<
	@touch $@

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

docs-serve: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

clean:
	rm -rf build dist site *.egg-info rampde/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f $(if $(VENV),$(VENV)/.rampde)

distclean: clean
	$(if $(VENV),rm -rf $(VENV))

# The few commands of this project. `make demo` and `make test` need Python 3.11+, its venv module and nothing else.
# PYTHON chooses the interpreter that makes .venv; ARGS goes to the command that a target runs.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

LOCK := requirements.lock
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
pin = $(shell grep '^$(1)==' $(LOCK))

.DEFAULT_GOAL := help
.PHONY: help install install-test test lint format serve demo bench soak image-test docs lock clean

help:
	@echo 'make demo      train, convert, serve and benchmark, from nothing to a printed result (ARGS=--keep leaves it running)'
	@echo 'make test      all tests (ARGS goes to pytest)'
	@echo 'make serve     the service on 127.0.0.1:8000 with its data in .data (ARGS=--help shows the options)'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     the benchmarks behind the figures of the README'
	@echo 'make soak      the long tests: thirty minutes in all (or SOAK_SECONDS), and a table of what they measured'
	@echo 'make image-test  builds the image without a Docker engine and uses it (root, buildah, debootstrap)'
	@echo 'make docs      the pages of docs/ that are written from the code'
	@echo 'make install   only the environment in .venv'

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

# torch first and by exact version: a range would let another package pull a different build of several GB.
$(VENV)/.installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or later is needed; set PYTHON=python3.x'; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(LOCK) '$(call pin,torch)' '$(call pin,setuptools)'
	$(PIP) install -q --no-build-isolation -c $(LOCK) -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation -c $(LOCK) -e '.[demo,test]'
	@touch $@

# The tests and the services that they start share the cores: threads that wait must not spin.
test soak: export OMP_WAIT_POLICY ?= PASSIVE

# Two processes, each with the files of its own: half of a test's time is waiting for a service.
# The files stay in their order, for tests/conftest.py puts the slowest first.
test: install-test
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict service

format: install-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: install
	$(PY) -m service.settings > docs/configuration.md

serve: install
	$(VENV)/bin/foldserve serve --data-dir .data $(ARGS)

demo: install
	$(VENV)/bin/foldserve demo $(ARGS)

bench: install
	$(PY) -m benchmarks $(ARGS)

image-test: install
	PYTHON=$(PY) deploy/image/test.sh

# Every long test has a share of SOAK_SECONDS (1800 unless set) and is ended when that is over.
soak: install-test
	$(PY) -m pytest -m soak -s $(ARGS)

# Resolves anew in a throw-away environment. Raise the versions of torch and setuptools in the lock by hand first.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install -q '$(call pin,torch)' '$(call pin,setuptools)'
	$(VENV)-lock/bin/pip install -q --no-build-isolation '.[demo,test,postgres]'
	grep '^#' $(LOCK) > $(LOCK).new
	$(VENV)-lock/bin/pip freeze --all --exclude foldserve --exclude pip | sed 's/+.*//' | LC_ALL=C sort -f >> $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf $(VENV)-lock build

clean:
	rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

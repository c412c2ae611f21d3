# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up, once, in $(VENV). Nothing but Python 3.11 to 3.13, pip and make is asked of the machine.

VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

# 3.11 first: it is the version with most wheels for the pinned torch.
ALLOWED := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do $$p $(ALLOWED) && { command -v $$p; break; }; done)
else
override PYTHON := $(shell $(PYTHON) $(ALLOWED) && command -v $(PYTHON))
endif

.NOTPARALLEL:
.PHONY: help quickstart serve test lint format test-faults test-gpu docs wheel notebook images clean \
	setup-run setup-train setup-serve setup-dev setup-test setup-docs
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

quickstart: setup-run ## prime the embedded teacher and print its table
	@$(BIN)/hmf prime recipes/quickstart/recipe.yaml

MODEL ?= runs/quickstart/model
serve: setup-serve ## serve a Hybrid by vLLM: make serve MODEL=runs/quickstart/model
	@$(BIN)/hmf serve "$(MODEL)"

test: setup-test lint ## linters, layering, types and all tests
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

FAULTS ?= 8
test-faults: setup-test ## damaged inputs, kills and odd requests at length, with new random numbers: make test-faults FAULTS=30
	@HMF_FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/faults

lint: setup-dev ## style, spelling, layering and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/codespell
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

format: setup-dev ## format the sources with ruff
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

docs: setup-docs ## build the documents as a site in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "saved build/site; open build/site/index.html"

WORKERS ?= 4
test-gpu: ## the tests that need CUDA or vLLM, with the python3 on the path; installs nothing: make test-gpu WORKERS=12
	@python3 -c 'import setuptools; setuptools.setup()' --quiet egg_info # by which vLLM finds the plugin in src
	@export PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}"; \
	python3 -m pytest -n $(WORKERS) --no-loadscope-reorder -m "(gpu or vllm) and not alone"; together=$$?; \
	python3 -m pytest -m alone tests/bench && exit $$together

wheel: setup-run ## build dist/*.whl, which brings recipes and the teacher
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

notebook: setup-run ## run notebooks/quickstart.ipynb anew
	@$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt nbclient ipykernel ipywidgets
	@rm -rf notebooks/runs
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/notebook.py notebooks/quickstart.ipynb

images: ## build the images hmf-train and hmf-serve, by docker
	docker build --file docker/train.Dockerfile --tag hmf-train .
	docker build --file docker/serve.Dockerfile --tag hmf-serve .

clean: ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

setup-run setup-train setup-serve setup-dev setup-test setup-docs: setup-%: $(BIN)/python
	@$(BIN)/python tools/install.py $*

# Debian's python3 comes without ensurepip: then the pip of the machine fills the new environment.
$(BIN)/python:
	$(if $(PYTHON),,$(error Python 3.11 to 3.13 is needed and was not found: install one, or name it by PYTHON=...))
	@echo "[install] a virtual environment in $(VENV), by $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $@ --quiet install pip; } \
		|| { rm -rf $(VENV); echo "[install] $(PYTHON) can make no virtual environment: install its venv package"; exit 1; }

# Every target builds what it needs from nothing. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
TINKER_VENV := .venv-tinker
COOKBOOK_VENV := .venv-cookbook
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test faults fuzz cookbook compat check format bench docs serve clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## Fine-tune the model that ships and show what it learned
	$(BIN)/tinsmith demo

serve: $(VENV)/.installed ## Serve the model that ships on http://127.0.0.1:8000
	$(BIN)/tinsmith serve

test: $(VENV)/.dev $(TINKER_VENV)/.installed ## Run all tests
	$(BIN)/python -m pytest

faults: $(VENV)/.dev $(TINKER_VENV)/.installed ## Kill servers and engines, break disks and networks (20 minutes; needs strace)
	command -v strace > /dev/null || apt-get install --yes --quiet strace
	FAULTS=1 $(BIN)/python -m pytest tests/faults tests/contract/test_client_leaks.py

fuzz: $(VENV)/.dev ## Generated tests with new cases, and generated requests to every documented operation
	EXPLORE=20 $(BIN)/python -m pytest tests/unit/data tests/unit/control tests/unit/wire tests/unit/test_tiny_model.py
	$(BIN)/python scripts/fuzz_api.py

check: $(VENV)/.dev ## Lint, types, import contracts, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/build_proto.py --check

format: $(VENV)/.dev ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cookbook: $(VENV)/.dev $(COOKBOOK_VENV)/.installed ## Run the newest tinker-cookbook's recipes against a server
	$(BIN)/python -m tests.cookbook

compat: $(VENV)/.installed ## Try every method of every official SDK; writes docs/compatibility.md
	$(BIN)/python scripts/compat.py

bench: $(VENV)/.dev $(TINKER_VENV)/.installed ## Measure speed and memory; figures go to bench/results/
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.compare
	$(BIN)/python -m bench.wire

docs: $(VENV)/.docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

clean: ## Remove environments and everything generated
	rm -rf $(VENV) $(TINKER_VENV) $(COOKBOOK_VENV) .venv-compat site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt --editable '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --group docs
	@touch $@

# The official SDK pins other versions than ours: it lives in its own environment.
$(TINKER_VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(TINKER_VENV)
	$(TINKER_VENV)/bin/python -m pip --quiet install --upgrade pip
	$(TINKER_VENV)/bin/python -m pip --quiet install --constraint constraints.txt 'tinker==0.38.0' 'transformers>=5,<6' torch
	@touch $@

# everything tinker-cookbook needs but tml-renderers, which only its newest chat format uses
$(COOKBOOK_VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(COOKBOOK_VENV)
	$(COOKBOOK_VENV)/bin/python -m pip --quiet install --upgrade pip
	$(COOKBOOK_VENV)/bin/python -m pip --quiet install --constraint constraints.txt tinker torch transformers datasets \
		huggingface-hub aiohttp anyio blobfile chz cloudpickle numpy pillow pydantic pyrage rich safetensors termcolor \
		tiktoken tqdm
	$(COOKBOOK_VENV)/bin/python -m pip --quiet install --no-deps tinker-cookbook
	@touch $@

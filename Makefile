# What people do every day. `make help` lists it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint format type layers docs test bench clean

help: ## List these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(VENV)/.installed ## Create .venv and install lora-merge with everything that development needs

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setup: creating $(VENV) and installing (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Build a small Llama, train a LoRA on it, merge it, and compare what the three generate
	$(BIN)/python scripts/demo.py

check: lint type layers docs test ## Everything that CI runs

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Let ruff rewrite the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## mypy, strict
	$(BIN)/mypy

layers: setup ## import-linter: who may import whom
	$(BIN)/lint-imports

docs: setup ## Check that the generated pages are current (scripts/docs.py --write renews them)
	$(BIN)/python scripts/docs.py --check

test: setup ## The test suite
	$(BIN)/python -m pytest -n $(JOBS)

bench: setup ## Time a merge against cp and PEFT on a synthetic Llama (SIZE=3 is gigabytes)
	$(BIN)/python scripts/bench.py --size $(or $(SIZE),3)

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) .demo .bench .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

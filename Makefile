# The two commands of a newcomer are `make demo` and `make test`; both set up `.venv` first.

VENV := .venv
BIN := $(VENV)/bin
# The first Python here that is 3.11 or 3.12.
PYTHON := $(firstword $(foreach name,python3.12 python3.11 python3 python,$(shell $(name) -c \
	'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) and print("$(name)")' 2>/dev/null)))
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-chat test check clean

help: ## show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

demo: $(INSTALLED) ## the whole job on this machine: base model and text to a fine-tuned model, in minutes
	@$(BIN)/python configs/demo_inputs.py workspace/demo
	@$(BIN)/finetune run configs/demo.yaml $(ARGS)

demo-chat: $(INSTALLED) ## the same for instruction tuning: a small model learns to answer questions
	@$(BIN)/python configs/demo_chat_inputs.py workspace/demo-chat
	@$(BIN)/finetune run configs/demo-chat.yaml $(ARGS)

# Two files at a time: much of a test's time is waiting for processes to start.
test: $(INSTALLED) ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED) ## lint and type-check
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean: ## remove what demo and tests made, not the environment
	rm -rf workspace .pytest_cache .mypy_cache .ruff_cache

# torch comes first and by exact version, so that nothing else pulls in another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; none of python3.12, python3.11, python3 is one"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version); this takes a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The two commands of a newcomer are `make demo` and `make test`; both set up `.venv` first.

VENV := .venv
BIN := $(VENV)/bin
# The first Python here that is 3.11 or 3.12.
PYTHON := $(firstword $(foreach name,python3.12 python3.11 python3 python,$(shell $(name) -c \
	'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) and print("$(name)")' 2>/dev/null)))
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-chat test test-gpu test-containers test-browser image-cpu image-gpu image-runner wheels check clean

help: ## show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(INSTALLED) ## the whole job on this machine: base model and text to a fine-tuned model, in minutes
	@$(BIN)/python configs/demo_inputs.py workspace/demo
	@$(BIN)/finetune run configs/demo.yaml $(ARGS)

demo-chat: $(INSTALLED) ## the same for instruction tuning: a small model learns to answer questions
	@$(BIN)/python configs/demo_chat_inputs.py workspace/demo-chat
	@$(BIN)/finetune run configs/demo-chat.yaml $(ARGS)

# Three files at a time, on two cores, too: much of a test's time is waiting for other processes. Four gain nothing there.
test: $(INSTALLED) ## run the tests
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: $(INSTALLED) ## run the tests that need an NVIDIA GPU; all others compute on the CPU
	@$(BIN)/python -m pytest -m gpu tests/core/test_on_gpu.py $(ARGS)

# An engine and images where there are none: tests/containers/prepare.sh.
test-containers: $(INSTALLED) ## run the tests that need a Docker engine and the image megatron-flows:cpu
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m docker tests/containers tests/compose $(ARGS)

# A browser where there is none: tests/browser/prepare.sh.
test-browser: $(INSTALLED) ## run the tests of the web UI, which need Chromium
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	@$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

DOCKER := docker
# Where there is an environment, its Python's version, for which `make wheels` fetches; else the Dockerfile's own.
BASE = $(shell $(BIN)/python -c 'import sys; print("--build-arg BASE=python:%d.%d-slim" % sys.version_info[:2])' 2>/dev/null)
image-cpu: ## build the image of stages on machines without GPU
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BASE) $(BUILD) -f containers/cpu.Dockerfile -t megatron-flows:cpu .

image-gpu: ## build the image of stages on machines with NVIDIA GPUs
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD) -f containers/gpu.Dockerfile -t megatron-flows:gpu .

image-runner: ## build the image of a runner for CPUs, on image-cpu's (docker-compose.yml)
	DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD) -f containers/runner.Dockerfile -t megatron-flows:runner .

# The index of PyTorch without CUDA that the image's Dockerfile names; empty: pip's usual one.
TORCH_INDEX = $(shell sed -n 's/^ARG TORCH_INDEX=//p' containers/cpu.Dockerfile)
DOWNLOAD = $(BIN)/python -m pip download -qq -c constraints.txt -d containers/wheels --find-links containers/wheels
wheels: containers/wheels/.fetched ## fetch what image-cpu and image-runner need, so that they can be built without a network
containers/wheels/.fetched: $(INSTALLED) constraints.txt
	@rm -f containers/wheels/*.whl
	@$(DOWNLOAD) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(DOWNLOAD) '.[core,flows]'
	@rm -f containers/wheels/megatron_flows-*.whl
	@touch $@

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

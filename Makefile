# Everything runs in .venv, which every target makes or completes first. COMFYUI_PATH=folder uses that ComfyUI.
PYTHON ?= python3
PORT ?= 8188
RUN = .venv/bin/python
ALL = --numprocesses 2 --no-loadscope-reorder --durations=30

# As typed, without make's expansion of $: a prompt may hold any character. The recipes read them as "$$PROMPT".
override PROMPT := $(value PROMPT)
override NEGATIVE := $(value NEGATIVE)
export PROMPT NEGATIVE COMFYUI_PATH

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-all test-versions check bench bench-gpu gpu-kit nano clean

help: ## this list
	@echo "make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the environment: .venv and a ComfyUI in it, pinned (the other targets see to it)
	@$(PYTHON) .ci/setup.py

demo: setup ## an image through a real ComfyUI: PROMPT="two red stars on a blue background" NEGATIVE= SEED= STEPS= GUIDANCE= WIDTH= HEIGHT=
	@$(RUN) .ci/demo.py $(if $(PROMPT),--prompt="$$PROMPT") $(if $(NEGATIVE),--negative="$$NEGATIVE") \
		$(if $(SEED),--seed=$(SEED)) $(if $(STEPS),--steps=$(STEPS)) $(if $(GUIDANCE),--guidance=$(GUIDANCE)) \
		$(if $(WIDTH),--width=$(WIDTH)) $(if $(HEIGHT),--height=$(HEIGHT))

serve: setup ## ComfyUI with the pack, to open in a browser: PORT=8188 ARGS="more ComfyUI flags"
	@$(RUN) .ci/serve.py --port $(PORT) $(ARGS)

test: setup ## the tests, two at a time, without the slow ones; or some, slow or not: ARGS="tests/test_rope.py -k name"
	@$(RUN) -m pytest $(or $(ARGS),$(ALL) -m "not slow")

test-all: setup ## every test, as before a release
	@$(RUN) -m pytest $(ALL)

test-versions: setup ## unit and node tests on the oldest and the newest Python and packages, an hour and 8 GB: ARGS="oldest"
	@$(RUN) .ci/versions.py $(ARGS)

check: setup ## lint, format, import floors, types
	@mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/zimage_pack
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pytest -q tests/test_floors.py
	@$(RUN) -m mypy

bench: setup ## speed and memory beside diffusers and ComfyUI, on a CPU, into benchmarks/RESULTS.md: ARGS="step vae"
	@$(RUN) -m benchmarks $(ARGS)

bench-gpu: ## is all of it right on a GPU, and how fast: planned to fit 9 minutes on an H100, with this PYTHON or .venv's, no network: OUT=folder
	@$(or $(wildcard $(RUN)),$(PYTHON)) -m benchmarks.gpu --out $(or $(OUT),build/gpu-results) $(ARGS)

gpu-kit: setup ## build/gpu-kit/, which bench-gpu needs on a machine where `make setup` can't run
	@$(RUN) .ci/gpu_kit.py

nano: setup ## trains the nano model anew, hours on a CPU: ARGS="..."
	@$(RUN) -m nano $(ARGS)

clean: ## deletes caches and build leftovers; images, .comfyui and .venv stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './.comfyui/*' -prune -exec rm -rf {} +

# Every target but bench-gpu and gpu-contact sets itself up: a virtual environment in .venv with the pinned versions of what it needs, then the job.
PYTHON ?= python3
MODEL ?= demo
BIN := .venv/bin
DEMO := .venv-demo
OLDEST := .venv-oldest
READY := .venv/.ready
INSTALL := $(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-oldest lint bench bench-gpu gpu-contact clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

serve: $(READY) ## start the HTTP server with the model in the box, on http://127.0.0.1:8000 (MODEL=... for another, ARGS="--port 8001")
	@$(BIN)/vlserve serve $(MODEL) $(ARGS)

demo: $(READY) $(DEMO)/.ready ## chat with pictures in the browser, on http://127.0.0.1:7860 (MODEL=... for another)
	@$(DEMO)/bin/python examples/gradio_demo.py --python $(BIN)/python --model $(MODEL) $(ARGS)

test: $(READY)-test $(DEMO)/.ready ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-oldest: $(OLDEST)/.ready ## run kernels, engines and the rehearsal with the oldest torch and Triton that vlserve takes
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 tests/rehearsal tests/engine tests/kernels

lint: $(READY)-lint ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)-test ## time the server on this machine: concurrency and start-up
	$(BIN)/python benchmarks/bench_server.py

# takes what is there: a GPU machine may have no way to install anything, and needs torch, Triton and timm only
bench-gpu: ## check and time kernels and whole models on an NVIDIA GPU (ARGS="--dry-run" without one, "--help" for more)
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/bench_gpu.py $(ARGS)

# takes what is there, as bench-gpu does
gpu-contact: ## try everything once on an NVIDIA GPU, in six minutes at most (ARGS="--rehearse" without one, "--list", "--help")
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_contact.py $(ARGS)

clean: ## remove the virtual environments and caches
	rm -rf .venv .venv-demo .venv-oldest .venv-ray .gpu-contact build .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "vlserve needs Python 3.10 or newer; this is %s. Set PYTHON=/path/to/python3" % sys.version.split()[0]'
	@echo "setting up .venv with $$($(PYTHON) --version); torch is large, so the first time takes a few minutes"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(INSTALL) -e .
	@touch $@

# the browser page's own, since gradio does not take the Pillow that vlserve is tested with
$(DEMO)/.ready: $(READY) examples/gradio_constraints.txt
	@$(DEMO)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install --progress-bar on --disable-pip-version-check -c examples/gradio_constraints.txt gradio openai httpx2
	@touch $@

# several gigabytes: PyPI's torch brings CUDA's libraries. Of the extra `test` it takes what these tests need
$(OLDEST)/.ready: pyproject.toml tests/oldest_constraints.txt
	@$(OLDEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --progress-bar on --disable-pip-version-check -c tests/oldest_constraints.txt \
		-e '.[bench]' jsonschema psutil pytest pytest-xdist
	@touch $@

$(READY)-%: $(READY)
	$(INSTALL) -e '.[$*]'
	@touch $@

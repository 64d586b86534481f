# Needs make and Python 3.11 or newer; the rest is set up in .venv, from the versions in constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help setup demo man reference docs test test-all test-gpu test-ray test-oldest fuzz lint format types demo-model bench-generate bench-rollout bench-memory bench-batch bench-workers bench-forwards bench-cache bench-threads bench-scale bench-gpu ci clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
OLDEST := .venv-oldest
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# The tested version first. `make PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
	echo $$python && break; done)

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Install wancli and its tools in .venv; needs the network once

# Once made, nothing here runs again, pip included, until one of these two files changes.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 or newer found (python3 is" \
	  "$$(python3 --version 2>&1 || true)). Install one, or: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setup: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "setup: this Python cannot make virtual environments." \
	  "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setup: installing $(TORCH), which is large"
	@$(PIP) install -c constraints.txt "$(TORCH)"
	@echo "setup: installing wancli and what it needs, in the versions of constraints.txt"
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "setup: done; wancli is $(BIN)/wancli"

demo: $(READY) ## Write demo.mp4 with the model inside the package
	@echo 'demo: wancli generate "a red circle moving right on a black background" --seed 1'
	@$(BIN)/wancli generate "a red circle moving right on a black background" --seed 1 \
	  --output demo.mp4 --overwrite
	@echo "demo: now open demo.mp4. What it was made of: $(BIN)/wancli show demo.mp4"

man: $(READY) ## Write the man page wancli.1; read it with: man ./wancli.1
	@$(BIN)/python -m wancli.cli.reference man > wancli.1 && echo "man: wrote wancli.1"

reference: $(READY) ## Write docs/cli.md, the reference of every command, from the program
	@$(BIN)/python -m wancli.cli.reference > docs/cli.md && echo "reference: wrote docs/cli.md"

docs: $(DOCS) ## Build README.md and docs/ as a site, in site/
	@echo "docs: mkdocs build --strict; then open site/index.html"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(DOCS): $(READY) pyproject.toml constraints.txt
	@echo "docs: installing the generator of the site"
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

test: $(READY) ## Run the tests, all but the slow ones
	@echo "test: all but the slow ones, two at a time; the slow ones too: make test-all"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(READY) ## Run the slow tests too
	@echo "test-all: the slow tests too, some minutes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not gpu'

test-gpu: $(READY) ## Run the tests that need a CUDA GPU
	@echo "test-gpu: those marked gpu, on the first GPU"
	@$(BIN)/python -m pytest -m gpu

test-ray: $(READY) ## Install Ray, 80 MB, and run the tests that need a cluster: two minutes
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[ray]'
	@echo "test-ray: a head and two nodes in this machine; actors, nodes and drivers are killed"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/batches/test_ray.py

test-oldest: $(OLDEST)/.ready ## Run the tests with the lowest versions that pyproject.toml allows
	@echo "test-oldest: all but the slow tests, in $(OLDEST)"
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

# Of PyTorch this is a CUDA build of some GB, unless pip finds another: the tests need none of it.
$(OLDEST)/.ready: pyproject.toml constraints.txt tests/oldest.py
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(PYTHON) tests/oldest.py > $(OLDEST)/constraints.txt
	@echo "test-oldest: installing the versions of $(OLDEST)/constraints.txt, some GB"
	@$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt hatchling editables
	@$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt --no-build-isolation -e '.[dev,gpu]'
	@touch $@

fuzz: $(READY) ## Try the whole campaign of hostile input, kills and full disks: most of an hour
	@echo "fuzz: docs/reliability.md says what is tried, and what counts as a failure"
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

lint: $(READY) ## Check style
	@echo "lint: ruff check, ruff format --check"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY) ## Rewrite files the way lint wants them
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(READY) ## Check types
	@echo "types: mypy --strict"
	@$(BIN)/mypy wancli tests benchmarks examples

demo-model: $(READY) ## Train the model inside the package: hours on 2 cores, minutes on a GPU; resumes
	@echo "demo-model: training into wancli/demo/model; checkpoints and curves in demo-work"
	@$(BIN)/python -m wancli.demo.train
	@echo "demo-model: measuring it, and writing its model card"
	@$(BIN)/python -m wancli.demo.evaluate --card --work demo-work; missed=$$?; \
	  $(BIN)/python -m wancli.demo.evaluate --preset demo-4step && exit $$missed

bench-generate: $(READY) ## Time wancli generate against a plain diffusers script
	@$(BIN)/python benchmarks/generate.py

bench-rollout: $(READY) ## Time the rolling cache against a concatenating one and recomputing
	@$(BIN)/python -m benchmarks.rollout

bench-memory: $(READY) ## Show that a long rollout does not grow
	@$(BIN)/python -m benchmarks.memory

bench-batch: $(READY) ## Time 50 videos in one batch and one by one, and planning 100,000
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.batch videos
	@$(BIN)/python -m benchmarks.batch plan

bench-workers: $(READY) ## Show that a worker of a batch does not grow; with Ray, time its actors too
	@$(BIN)/python -m benchmarks.batch_workers memory
	@! $(BIN)/python -c "import ray" 2>/dev/null || $(BIN)/python -m benchmarks.batch_workers ray

bench-forwards: $(READY) ## Time a forward: plain, compiled, fused and quantized
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.forwards

bench-cache: $(READY) ## Say what each cache costs and wins on the demo model
	@$(BIN)/wancli bench benchmarks/cache.toml --output bench-cache --overwrite

bench-threads: $(READY) ## Time a video beside busy processes, as torch's threads wait now and before
	@$(BIN)/python -m benchmarks.threads

bench-scale: $(READY) ## Time the ledger of a batch with 1 to 64 processes; simulate up to 10,000 workers
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale

bench-gpu: $(READY) ## Measure this GPU for 8 minutes: kernels, denoiser, VAE, rollouts
	@echo "bench-gpu: a line for each measurement, appended to bench-gpu.json"
	@$(BIN)/python -m benchmarks.gpu --seconds 480 --out bench-gpu.json

ci: ## What a change must pass, in a fresh environment
	@bash .ci/run

clean: ## Remove what these targets made: .venv, caches, demo.mp4 (trained checkpoints stay)
	rm -rf $(VENV) $(OLDEST) build dist site bench-cache demo.mp4 demo.json wancli.1 .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find wancli tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

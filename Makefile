# Thin names for scripts/: everything works without make as well.
# Where rustup puts cargo, for shells that started before it was installed.
export PATH := $(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help run test bench bench-200k latency throughput attack redis-cost l1 stranger autobahn imports lint fmt setup

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 12

run: ## Build, start a whole cluster and show a push (ARGS=--once: stop)
	@scripts/run.sh $(ARGS)

test: ## Install dependencies and run every test
	@scripts/test.sh $(ARGS)

bench: ## All benchmarks beside a floor, 15 min (ONLY=idle,handshake: some)
	@scripts/bench.sh bench $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-200k: ## 200,000 connections, 10,000 messages/s (ARGS='--sessions 50000')
	@scripts/bench.sh bench --only scale --access-nodes 11 --local-agents 11 --sessions 200000 --rate 2500 \
		--push-rate 10000 --push-linger-ms 20 --push-warmup-seconds 20 --limit-seconds 1800 \
		--out target/bench/bench-200k.json --report bench-200k-report $(ARGS)

latency: ## Latency by hop, produce to device (ARGS='--push-rate 5000')
	@scripts/bench.sh bench --only latency --out target/bench/latency.json --report latency-report $(ARGS)

throughput: ## Messages per second, and CPU time by process
	@scripts/bench.sh bench --only unicast --out target/bench/throughput.json --report throughput-report $(ARGS)

attack: ## Honest handshakes beside attacks on the devices' port, 20 min
	@scripts/bench.sh bench --only attack --out target/bench/attack.json --report attack-report $(ARGS)

redis-cost: ## Cost of accept and ack in Redis, relative to the barest scripts
	@scripts/setup.sh run
	cargo bench --locked -p barid-mailbox --bench redis_cost -- $(ARGS)

l1: ## Staleness of the dispatcher's cache (BARID_L1_SECONDS=30)
	@scripts/setup.sh run
	BARID_L1_SECONDS=$${BARID_L1_SECONDS:-30} cargo test --locked --release -p barid-dispatcher --test staleness -- --nocapture

stranger: ## Every fault of the stranger's suite (ARGS='--only NAME', --list)
	@scripts/stranger.sh $(ARGS)

autobahn: ## Autobahn's WebSocket suite against access (ARGS='6.* 7.*')
	@scripts/autobahn.sh $(ARGS)

imports: ## Draw which file imports which (ARGS=access: one crate)
	@python3 scripts/imports.py $(ARGS)

lint: ## Check format, lints and imports
	@scripts/lint.sh

fmt: ## Format
	cargo fmt --all

setup: ## Install dependencies, and do nothing else
	@scripts/setup.sh test

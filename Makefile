# Every command of the project. `make help` lists them.

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint setup models build start stop psql env install uninstall bench bench-queries bench-curves bench-storage bench-serving bench-larger bench-cache bench-cache-clients bench-operators bench-deduplicate bench-sets pg-regress clean

help: ## lists these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## installs what is missing, builds, starts a private server, and gives a tour of it in SQL
	@scripts/demo

test: ## everything that CI runs
	@scripts/test

test-full: ## and what is too long for CI
	@scripts/test --full

lint: setup ## formatting, and clippy with warnings as errors
	@scripts/lint

pg-regress: setup ## PostgreSQL's own suites with tensor_block as the default access method, on a server with assertions
	@scripts/pg-regress

bench: models build ## rows/s and MB/s beside PL/Python with ONNX Runtime, and the curves of docs/plots
	@benches/run
	@benches/run-curves

bench-queries: models build ## predictions in plain queries beside PL/Python, a client with COPY, and their bounds
	@benches/run-queries

bench-curves: models build ## rows/s against batch size, workers, rows and width, with their bounds, as tables and plots
	@benches/run-curves

bench-storage: models build ## what the block store costs beside heap: loads, WAL, reads
	@benches/run-storage

bench-cache: setup ## hit ratios of the block cache's policies beside the clairvoyant optimum
	@benches/run-cache-trace

bench-cache-clients: setup ## predictions per second against clients, over models that do not fit in the block cache
	@benches/run-cache-clients

bench-operators: models ## CPU time of models and layers beside tract and ONNX Runtime, one thread each
	@benches/run-operators

bench-serving: models build ## memory of idle sessions, first calls, throughput against clients (SHORT=1: one minute)
	@benches/run-serving $(if $(SHORT),--short)

bench-larger: setup ## a model of 2 GB in a quarter of that memory, beside the bounds of disk and arithmetic
	@benches/run-larger

bench-deduplicate: setup ## five text classifiers before and after deduplicate_model, beside other ways (QUICK=1: small ones)
	@benches/run-deduplicate $(if $(QUICK),--quick)

bench-sets: setup ## 5,000 models as a set: bytes, saving, recovering over generations, predictions (QUICK=1: two minutes)
	@benches/run-sets $(if $(QUICK),--quick)

setup: ## installs what is missing: packages, cargo-pgrx, private servers, Python packages
	@scripts/setup

models: setup ## downloads and makes the models of the demo, the tests and the benchmarks
	@scripts/make-models

build: setup ## builds the extension into the private server
	@scripts/install-extension

start: build ## starts the private server under target/, with the extension
	@scripts/cluster start && scripts/cluster status

stop: ## stops the private server
	@scripts/cluster stop

psql: start ## opens psql on the private server
	@scripts/cluster psql

env: ## prints the lines that point other programs to the private server: eval "$(make -s env)"
	@scripts/cluster env

install: setup ## installs into the system's PostgreSQL, the one of pg_config (PG_CONFIG=...)
	@scripts/install-system

uninstall: ## takes the extension's files out of the system's PostgreSQL
	@scripts/install-system --remove

clean: ## stops the private servers and removes all that was made
	@scripts/clean

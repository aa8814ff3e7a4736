# Wrenn's tasks. Each does its own set-up, so a fresh clone needs nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# rustup puts cargo into the home, which a shell that is older than the installation does not search yet.
export PATH := $(PATH):$(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin
CARGO_TARGET_DIR ?= target
CARGO ?= cargo
# Arguments for the program, for example: make up ARGS="--listen 127.0.0.1:9000"
ARGS ?=

.PHONY: help up build test check bench bench-control clean setup

help: ## Show this list
	@printf 'Wrenn. Usage: make TARGET [ARGS="…"]\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## Install what is missing (apt), after saying what and why
	@scripts/setup.sh --for up

build: setup ## Build the release binary
	$(CARGO) build --release --locked -p wrenn

up: build ## Start a whole platform here: http://127.0.0.1:8000
	@exec "$(CARGO_TARGET_DIR)/release/wrenn" up $(ARGS)

test: ## Run all tests, with real virtual machines
	@scripts/setup.sh --for test
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  echo '$(CARGO) nextest run --workspace --locked' && \
	  $(CARGO) nextest run --workspace --locked $(ARGS); \
	else \
	  echo '$(CARGO) test --workspace --locked --lib --bins --tests' && \
	  $(CARGO) test --workspace --locked --lib --bins --tests $(ARGS); \
	fi
	$(CARGO) test --workspace --locked --doc

check: ## Formatting, lints, licences and sources of dependencies, documentation
	@scripts/setup.sh --for test
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@scripts/deny.sh
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked

bench: ## Measure speed and memory against floors taken in the same run, sandboxes first
	@scripts/setup.sh --for bench
	$(CARGO) build --release --locked -p wrenn
	@"$(CARGO_TARGET_DIR)/release/wrenn" bench --json-out "$(CARGO_TARGET_DIR)/bench-results.json" $(ARGS)
	@$(MAKE) --no-print-directory bench-control ARGS="$(filter --quick,$(ARGS))"

bench-control: ## Measure the control plane alone: PostgreSQL, a simulated host, no machines
	@scripts/setup.sh --for bench
	$(CARGO) bench --locked -p wrenn-control --bench control_plane -- \
	  --json-out "$(abspath $(CARGO_TARGET_DIR))/bench-control-results.json" $(ARGS)

clean: ## Remove what was built; sandboxes and caches outside the checkout stay
	$(CARGO) clean

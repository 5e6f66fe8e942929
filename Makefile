# nbd-vmdk: `make serve IMAGE=disk.vmdk` and `make test` do all their own set-up; `make` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
IMAGE ?= .demo/demo.vmdk
ARGS ?=
PYTEST ?=
JOBS ?= 2
FUZZ_SECONDS ?= 14400
CRASH_STATES ?= 1000000
SOAK_SECONDS ?= 300
QUICK ?=
BENCH ?=

export IMAGE

# One thing after the other: there are two cores, and the tests say the last word.
.NOTPARALLEL:

VERBS := help setup serve test lint fuzz fuzz-short guest pytest soak crash-soak bench wheel man deb deb-check clean
.PHONY: $(VERBS)

# Ctrl-C is how serving ends; of the exit code 130 for that, make would complain.  No shell stands between, so
# that make's own SIGTERM reaches the server as well.
QUIETLY := 'from nbd_vmdk.cli import INTERRUPTED, main; code = main(); \
  raise SystemExit(0 if code == INTERRUPTED else code)'

# Written so, nothing but the demo disk would be served.
ifneq ($(filter serve,$(MAKECMDGOALS)),)
ifneq ($(filter-out $(VERBS),$(MAKECMDGOALS))$(findstring command line,$(origin image))$(if $(IMAGE),,none),)
$(error name the image so: make serve IMAGE=disk.vmdk)
endif
endif

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo "IMAGE=disk.vmdk   the image to serve (without it: a demo disk that is made first)"
	@echo "ARGS='-r'         more options for serve; PYTEST='-k name' for test; BENCH='--help' for bench"

setup: .venv/.ready ## system packages where missing, and .venv
	@:

.venv/.ready: pyproject.toml scripts/setup
	@scripts/setup

serve: .venv/.ready $(if $(filter .demo/demo.vmdk,$(IMAGE)),.demo/demo.vmdk) ## serve IMAGE over NBD until Ctrl-C; prints its URI
	@exec $(BIN)/python -c $(QUIETLY) serve $(ARGS) -- "$$IMAGE"

.demo/demo.vmdk: scripts/demo-disk | .venv/.ready
	@scripts/demo-disk $@

test: lint fuzz-short pytest ## everything: style, types, import rules, a minute of fuzzing, the tests

lint: .venv/.ready ## style, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz-short: .venv/.ready ## a minute of fuzzing, from the same start each time
	$(BIN)/python tests/fuzz/fuzz.py --seconds 60 --seed 1

fuzz: .venv/.ready ## fuzzing for hours: FUZZ_SECONDS=14400
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

guest: ## what the tests with a Linux guest need: QEMU, a kernel (cached)
	@scripts/guest-setup >/dev/null

pytest: .venv/.ready guest ## the tests alone
	$(BIN)/pytest -n $(JOBS) $(PYTEST)

soak: .venv/.ready ## many clients at once for minutes: SOAK_SECONDS=300
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/pytest tests/failing/test_stress.py $(PYTEST)

crash-soak: .venv/.ready ## power cuts for an hour or more: CRASH_STATES=1000000
	$(BIN)/python -m tests.crash.soak --states $(CRASH_STATES) --jobs $(JOBS)

bench: .venv/.bench ## measure against qemu-nbd: an hour; QUICK=1: three minutes
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(BENCH)

.venv/.bench: scripts/bench-setup pyproject.toml | .venv/.ready
	@scripts/bench-setup

wheel: .venv/.ready ## dist/nbd_vmdk-VERSION-py3-none-any.whl, for pipx and pip
	@rm -f dist/nbd_vmdk-*.whl
	@$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .
	@ls dist/nbd_vmdk-*.whl

man: .venv/.ready ## the manual pages, in build/man: man -l build/man/nbd-vmdk.1
	@$(BIN)/python scripts/manual.py build/man
	@echo build/man

deb: ## dist/nbd-vmdk_VERSION_all.deb, for Debian 12 and newer
	@scripts/deb

deb-check: ## the same, installed and tried in a fresh Debian 12; as root
	@scripts/deb --check

clean: ## remove all that make has made here
	rm -rf .venv .demo .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Penstock: one command for each thing people do. `make help` lists them; CI calls the same ones.
#
# PY    the Python to build the environment with (>= 3.11); default: the newest one found
# VENV  where the environment lives; default .venv. `make VENV=/path up` uses another one.
# ARGS  passed on: make up ARGS='--decode 2 --port 9000'

SHELL := /bin/sh
VENV ?= .venv
PY ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.penstock-installed

.DEFAULT_GOAL := help
.PHONY: help setup up down status test lint lock load bench-serve bench-dualpath bench-store bench-store-peers crash-loop bench-codec clean

help:  ## list these commands
	@awk 'BEGIN {FS = ":.*##"} /^[a-z-]+:.*##/ {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything at the locked versions (again only when they change)

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PY)" && "$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Penstock needs Python 3.11 or newer, and '$(PY)' is not one ($$("$(PY)" --version 2>&1 | head -n 1))."; \
		echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.13), or name yours: make PY=/path/to/python3 setup"; \
		exit 1; }
	@test -x "$(BIN)/python" || { echo "Creating $(VENV) with $$("$(PY)" --version) ..."; "$(PY)" -m venv "$(VENV)"; } || { \
		echo "'$(PY) -m venv' failed. On Debian and Ubuntu the module is a package of its own: apt install python3-venv"; \
		rm -rf "$(VENV)"; exit 1; }
	@echo "Installing Penstock and its packages (locked versions; torch is the big one) ..."
	"$(BIN)/python" -m pip install --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch "$@"
	@echo "Installed. Next: make up"

up: $(STAMP)  ## start a cluster on this machine and serve the demo model (ARGS='--port 9000 ...')
	@exec "$(BIN)/python" -P -m services.cli up $(ARGS)

down: $(STAMP)  ## stop a cluster that was started with ARGS=--detach
	@exec "$(BIN)/python" -P -m services.cli down $(ARGS)

status: $(STAMP)  ## what runs, where, and how loaded it is
	@exec "$(BIN)/python" -P -m services.cli status $(ARGS)

test: $(STAMP)  ## run all tests (ARGS='-k name' for some)
	"$(BIN)/python" -m pytest $(ARGS)

lint: $(STAMP)  ## ruff, mypy and the import contracts
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy" common services loadtest
	"$(BIN)/lint-imports"

lock: $(STAMP)  ## write requirements.lock again, at the newest versions
	"$(BIN)/python" deploy/lock.py

load: $(STAMP)  ## put a minute of chat and agent users on the running cluster and write a report
	@exec "$(BIN)/python" -m loadtest.load $(ARGS)

bench-serve: $(STAMP)  ## benchmark serving against transformers.generate; one JSON line
	@exec "$(BIN)/python" -m loadtest.bench_serve $(ARGS)

bench-dualpath: $(STAMP)  ## measure every route over shaped links in network namespaces; root; one JSON line
	@exec "$(BIN)/python" -m loadtest.dualpath $(ARGS)

bench-store: $(STAMP)  ## the kvstore's disk I/O beside fio (which must be installed); one JSON line
	@exec "$(BIN)/python" -m loadtest.bench_store $(ARGS)

bench-store-peers: $(STAMP)  ## the kvstore beside LMCache's and Mooncake's SSD tiers (installed apart); one JSON line
	@exec "$(BIN)/python" -m loadtest.bench_store_peers $(ARGS)

crash-loop: $(STAMP)  ## kill a kvstore a thousand times; it must lose and spoil nothing; one JSON line
	@exec "$(BIN)/python" -m loadtest.crash_loop $(ARGS)

bench-codec: $(STAMP)  ## benchmark the KV codecs: quality, speed, bytes and load time; one JSON line
	@exec "$(BIN)/python" -m loadtest.bench_codec $(ARGS)

-include deploy/docker/docker.mk

clean:  ## remove the environment and caches; data/ stays
	rm -rf "$(VENV)" build *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis .import_linter_cache

# Everything happens in .venv; nothing needs to be activated. Needs Python 3.11 or newer and make.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# More words for pytest, as in: make test ARGS="-x tests/core"
ARGS ?=
# Processes that share the tests; three of them run those with clusters of processes, see tests/conftest.py.
WORKERS ?= 4

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help up test check lint types layers sizes coverage format lock bench chaos docs clean

help:
	@echo "make up      run a three-node cluster with the demo agent on 127.0.0.1:8000, 8001, 8002 (Ctrl-C ends it)"
	@echo "make test    run all tests, with real servers"
	@echo "make check   lint, formatting, types, layers, sizes, coverage of the core"
	@echo "make format  put the code into its form"
	@echo "make lock    choose new versions of all dependencies"
	@echo "make bench   measure (not yet)"
	@echo "make chaos   kill and restart nodes, and harm the store, under load, for some minutes"
	@echo "make docs    build the documentation (not yet)"
	@echo "make clean   remove the environment and what tools left behind"

# --- what a user runs -------------------------------------------------------------------------------------------------

up: $(VENV)/.run-installed
	@exec $(BIN)/convener up

test: $(VENV)/.dev-installed tests/js/node_modules/.installed
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# --- what a contributor runs ------------------------------------------------------------------------------------------

check: lint types layers sizes coverage

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Runs on Node.js: that of the system, else one that it fetches.
types: $(VENV)/.dev-installed
	@scripts/ensure-test-tools
	$(BIN)/pyright

layers: $(VENV)/.dev-installed
	$(BIN)/lint-imports --no-cache

sizes: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q tests/test_sizes.py

# The core is pure, so its own tests can reach every branch of it, and must. What runs them again for each guard that is
# cut out reaches nothing more.
coverage: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q tests/core --ignore=tests/core/test_guards.py --cov=convener.core --cov-branch \
		--cov-report=term-missing:skip-covered --cov-fail-under=100

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hashes of every file of every version, and no address of an index: pip takes the files from where it is told to.
UV_COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
	--extra archive --extra embedded
lock: $(VENV)/.dev-installed
	$(PIP) install uv
	$(UV_COMPILE) --upgrade --group dev --output-file requirements/dev.txt
	$(UV_COMPILE) --upgrade --group build --constraint requirements/dev.txt --output-file requirements/run.txt

bench:
	@echo "not yet: there is no benchmark suite in this version" >&2; exit 1

# On clusters that it starts itself, and on no other. KILLS is how often each window of a turn is hit at least, RUNS how
# many runs there are: on Valkey, on Redis, and so on. CONVENER_TEST_SEED=… repeats what a failed one has drawn.
KILLS ?= 60
RUNS ?= 4
# How many people talk while nodes are restarted, and how often each node is.
CLIENTS ?= 50
ROUNDS ?= 3
# How many conversations, each with a client, a node has that is killed.
CONVERSATIONS ?= 1000
chaos: $(VENV)/.dev-installed tests/js/node_modules/.installed
	@TEST_KILLS=$(KILLS) TEST_RUNS=$(RUNS) TEST_CLIENTS=$(CLIENTS) TEST_ROUNDS=$(ROUNDS) TEST_CONVERSATIONS=$(CONVERSATIONS) \
		$(BIN)/python -m pytest -q -s tests/cluster/test_kill_windows.py \
		tests/cluster/test_rolling.py tests/cluster/test_crashes.py $(ARGS)
	@TEST_ALL_FAULTS=1 $(BIN)/python -m pytest -q tests/cluster/test_faults_of_the_store.py $(ARGS)
	@TEST_BOTH_STORES=1 $(BIN)/python -m pytest -q tests/cluster -k "redis and not faults" $(ARGS)

docs:
	@echo "not yet: there is no documentation build in this version" >&2; exit 1

clean:
	rm -rf $(VENV) tests/js/node_modules .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage

# --- installation; each step leaves a mark and is done again only if what it depends on has changed --------------------

$(VENV)/.created: scripts/make-venv
	@scripts/make-venv $(VENV)
	@touch $@

# run.txt is a part of dev.txt, version by version; so the two never undo each other's work.
$(VENV)/.run-installed: requirements/run.txt pyproject.toml $(VENV)/.created
	@echo "installing convener into $(VENV)"
	@$(PIP) install --require-hashes --no-deps -r requirements/run.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev-installed: requirements/dev.txt $(VENV)/.run-installed
	@echo "installing what tests and checks need into $(VENV)"
	@$(PIP) install --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

tests/js/node_modules/.installed: tests/js/package-lock.json
	@scripts/ensure-test-tools
	@if command -v npm >/dev/null 2>&1; then cd tests/js && npm ci --silent --no-audit --no-fund; fi
	@mkdir -p tests/js/node_modules && touch $@

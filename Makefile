# Needs git, make and Python 3.11 or newer. Everything is installed into .venv.
#   make demo                    a server, two streamed answers, their cost, and the experts' load
#   make test ARGS="-k batching" the tests, or some of them
#   make serve ARGS="--port 80"  a server that stays up
PYTHON ?= python3
ARGS ?=
# Test files that run at the same time: most wait for processes to start.
JOBS ?= 3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: setup test demo serve lint clean

setup: $(STAMP)

# The pinned torch goes first: a later step then keeps the build that is there instead of choosing another.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moeyard needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	test "$$(uname)" != Linux || $(BIN)/python -m pip install -c constraints.txt --no-deps --upgrade --target $(VENV)/triton triton
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/moeyard # where mypy finds the package by its name
	touch $@

test: setup
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

demo: setup
	$(BIN)/python -P -m moeyard.launch.demo

serve: setup
	$(BIN)/moeyard serve $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

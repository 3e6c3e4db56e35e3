# make demo    train a small model on this CPU, then accuracy against sleep depth
# make test    style, and every test that is neither slow nor needs a GPU
# make lint    style alone
# make clean   remove the environment and what the tools left behind
#
# Variables: PYTHON (3.10 to 3.12), PIP_ARGS (for pip install, such as an index that has CPU builds
# of torch), JOBS (test processes), TEST_ARGS (for pytest), DEMO_ARGS (for hybrid-sleep demo).

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
TEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/hybrid-sleep demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(TEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo 'hybrid_sleep needs Python 3.10 to 3.12; name one: make PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

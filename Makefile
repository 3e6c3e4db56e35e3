# make demo    train a small model on this CPU, then accuracy against sleep depth
# make test    style and every test that is neither slow nor needs a GPU
# make lint    style alone
# make clean   remove the environment and what tools left behind
#
# Variables: PYTHON (3.10 to 3.12), JOBS (test processes), PIP_ARGS (more arguments for pip, such
# as an index that has CPU builds of torch), DEMO_ARGS and TEST_ARGS.

PYTHON ?= python3
JOBS ?= 2
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/hybrid-sleep demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(TEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .

# Only a finished installation writes the file, so an interrupted one is taken up again.
$(READY): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); sys.exit(None if ok else \
	"hybrid_sleep needs Python 3.10 to 3.12; " + sys.executable + " is " + sys.version.split()[0] \
	+ ". Name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo          train a small model on this CPU, then accuracy against sleep depth
# make test          style, types, and every test that is neither slow nor needs a GPU
# make lint          style and types alone
# make test-newest   the tests with the newest releases of everything, in an environment of its own
# make constraints   write constraints.txt from that environment
# make clean         remove the environments and what the tools left behind
#
# Variables: PYTHON (3.11 or 3.12), PIP_ARGS (for pip install, such as an index that has CPU builds
# of torch), JOBS (test processes), TEST_ARGS (for pytest), DEMO_ARGS (for hybrid-sleep demo).

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
TEST_ARGS ?=
DEMO_ARGS ?=

# Where it is set, as in many containers, every process that a test starts compiles torch and
# transformers anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
# Where mypy finds the folders that install inside hybrid_sleep/.
BESIDE := .mypy_cache/beside/hybrid_sleep
NEWEST := .venv-newest
BIN := $(VENV)/bin
# The demo needs less than the tests, which add the rest to the same environment.
FOR_DEMO := $(VENV)/.installed-for-demo
FOR_TESTS := $(VENV)/.installed-for-tests
ASKS := setup.py pyproject.toml constraints.txt

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# Twice quiet: errors alone, as the warnings are about indexes that lack a package another one has.
# Compiling all of torch takes longer than installing it; what is imported is compiled then.
PIP = -m pip install -qq --no-compile --disable-pip-version-check $(PIP_ARGS)
PINNED := --constraint constraints.txt --build-constraint constraints.txt
PYTEST := -m pytest -q -n $(JOBS) --dist worksteal

# $(call environment,FOLDER): an environment there; one that a Python out of range made is replaced.
define environment
@$(PYTHON) -c '$(SUPPORTED)' || \
  { echo 'hybrid_sleep needs Python 3.11 or 3.12; name one: make PYTHON=python3.11' >&2; exit 1; }
@if [ -e $(1)/bin/python ] && ! $(1)/bin/python -c '$(SUPPORTED)'; then rm -rf $(1); fi
@$(PYTHON) -m venv $(1)
endef

.PHONY: demo test lint test-newest constraints clean

demo: $(FOR_DEMO)
	$(BIN)/hybrid-sleep demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(TEST_ARGS)

lint: $(FOR_TESTS)
	$(BIN)/ruff check .
	@mkdir -p $(BESIDE)
	@ln -sfn $(foreach top,kernels training eval hybrid_sleep/__init__.py,../../../$(top)) $(BESIDE)
	$(BIN)/mypy

# The stamps are written last, so an interrupted installation is taken up again.
$(FOR_DEMO): $(ASKS)
	$(call environment,$(VENV))
	@echo 'Installing what the demo needs into $(VENV); this takes a minute or two.'
	@$(BIN)/python $(PIP) --constraint constraints.txt pip
	@$(BIN)/python $(PIP) $(PINNED) --editable .
	@touch $@

$(FOR_TESTS): $(FOR_DEMO)
	@echo 'Installing what the tests need into $(VENV); this takes a few minutes.'
	@$(BIN)/python $(PIP) $(PINNED) --editable '.[test]'
	@touch $@

test-newest:
	$(call environment,$(NEWEST))
	@echo 'Installing the newest releases into $(NEWEST); this takes a few minutes.'
	@$(NEWEST)/bin/python $(PIP) --upgrade pip packaging
	@$(NEWEST)/bin/python .ci/newest.py requirements > $(NEWEST)/requirements.txt
	@$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager -r $(NEWEST)/requirements.txt
	@$(NEWEST)/bin/python $(PIP) --no-deps --editable .
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) $(TEST_ARGS); status=$$?; \
	  $(NEWEST)/bin/python .ci/newest.py report $$status; exit $$status

constraints:
	@$(NEWEST)/bin/python .ci/newest.py constraints > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

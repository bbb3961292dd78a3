# One command each, on a fresh clone with nothing but Python (>= 3.11) and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOOPS  := -m "row or not long" tests/integrations tests/optimizers/test_loops.py tests/optimizers/test_wrapped.py tests/optimizers/test_found_directions.py
# Neighbouring tests, which share a module's fixtures, go to one process; the one that ends first helps.
TWO    := -n 2 --dist worksteal
CONSTRAINTS ?= .ci/constraints.txt
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-long test-integrations test-minimum test-dist dist lint format types pytest docs readme matrix clean
.DEFAULT_GOAL := test

# A stamp per extra, so that the demo does not wait for the test tools.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	$(PIP) -e '.[$*]'
	touch $@

demo: $(VENV)/.examples  ## untuned Adler against ten SGD learning rates on handwritten digits
	$(BIN)/python -m examples.digits

test: lint $(VENV)/.examples $(VENV)/.diagnostics  ## what a change waits for: under three minutes on two cores
	$(MAKE) --no-print-directory -j 2 types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test $(VENV)/.examples
	$(BIN)/mypy

pytest: $(VENV)/.test $(VENV)/.examples $(VENV)/.diagnostics
	$(BIN)/python -m pytest $(TWO) -m "not long" src tests

test-long: $(VENV)/.test $(VENV)/.examples $(VENV)/.diagnostics  ## whole experiments, killed runs, timings
	$(BIN)/python -m pytest $(TWO) -m long src tests

# What the table of loops and frameworks counts. tests/integrations is not part of make test, which needs none of these packages.
test-integrations: $(VENV)/.test $(VENV)/.examples $(VENV)/.integrations  ## real processes, other packages
	$(BIN)/python -m pytest $(LOOPS)

matrix: $(VENV)/.test $(VENV)/.examples $(VENV)/.integrations  ## what was tested, into its page
	$(BIN)/python -m pytest $(LOOPS) --matrix docs/data/matrix.json
	$(PYTHON) docs/matrix.py

readme:  ## renders the measured tables into the README
	$(PYTHON) docs/readme.py

docs: $(VENV)/.docs  ## the site, into build/site; a broken link or reference is an error
	$(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

dist: $(VENV)/.release  ## source archive and wheel, as the package index would take them
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

test-dist: dist  ## from the archive alone, in an environment of its own: tests and site; the wheel by itself
	.ci/test-dist $(PYTHON)

# The least versions that pyproject.toml allows, on the least Python that is there.
test-minimum:  ## such as: make test-minimum PYTHON=python3.10
	$(MAKE) VENV=.venv-minimum CONSTRAINTS=.ci/minimum.txt pytest

clean:
	rm -rf $(VENV) .venv-minimum build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

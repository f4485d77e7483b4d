# make run    virtual environment, install, the main job
# make test   the test suite
# make check  lint, format, types
# make docs   the documentation, in build/site; warnings are errors
# make slow   the tests that take minutes, and new examples for those that draw them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test check docs slow clean

run: $(INSTALLED)
	$(BIN)/llmpipe

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses auto --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

slow: $(INSTALLED)
	$(BIN)/pytest -m slow
	HYPOTHESIS_PROFILE=new $(BIN)/pytest --numprocesses auto --dist loadfile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmpipe needs Python 3.11 or newer; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

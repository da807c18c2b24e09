# Every target works on a fresh machine: it makes .venv, installs into it, and touches nothing else.
# A stamp file a set of extras remembers what is installed, so the second call starts at once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
ARGS   ?=
# Processes that share the tests, one thread each.
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo  ## the main job on the embedded mini model; report in runs/demo/report.html (OUT=folder, ARGS=--quick)
	$(BIN)/d3po demo --out $(OUT) $(ARGS)

test: $(VENV)/.installed-test  ## run the test suite (ARGS="-k house" runs a part of it, WORKERS=8 shares it among more processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

lint: $(VENV)/.installed-lint  ## check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy fifa d3po train.py

format: $(VENV)/.installed-lint  ## rewrite the code the way `make lint` wants it
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:  ## remove caches and build leftovers; keep .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf $(VENV)

# An environment made by hand is used as it is; one that was cut short while it was made is made again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "This needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1 | grep -o 'Python [0-9.]*' || echo missing): install one, or name it with make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-demo: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-lint: EXTRAS := [lint]
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch $@

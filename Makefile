# Two commands are enough: `make figures` and `make test`. Both set up what is missing.

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= cpu
ONLY    ?=
MODEL   ?=
DEVICE  ?=
WORKERS ?= 2
LAB     ?=

# Names reach the shell in quotes, and as they were written: `value` expands no $ in them.
define newline


endef
quoted = '$(subst ','\'',$(1))'
listed = $(foreach word,$(1),$(call quoted,$(word)))
$(foreach name,PYTHON VENV PROFILE ONLY MODEL DEVICE WORKERS LAB,$(if $(findstring $(newline),$(value $(name))),\
	$(error $(name) holds a line break)))
$(if $(strip $(value VENV)),,$(error VENV is empty: name the folder of an environment, as in VENV=.venv))

HOMED  := $(subst $(newline),,$(subst $(newline)~/,$(HOME)/,$(newline)$(value VENV)))
PLACE  := $(call quoted,$(HOMED))
PY     := $(call quoted,$(HOMED)/bin/python)
SYSTEM := $(call quoted,$(value PYTHON))
ANY    := if test -x $(PY); then set -- $(PY); else set -- $(SYSTEM); fi; "$$@"
RUN     = $(PY) notebooks/run.py --profile $(call quoted,$(value PROFILE)) \
          $(if $(value ONLY),--only $(call listed,$(value ONLY))) \
          $(if $(value MODEL),-p MODEL $(call quoted,$(value MODEL))) \
          $(if $(value DEVICE),-p DEVICE $(call quoted,$(value DEVICE)))

.DEFAULT_GOAL := help
.PHONY: help setup environment assets gemma figures studies smoke notebooks paper site test lint lab bench clean distclean

help:  ## this list
	@echo "make TARGET [PROFILE=cpu|smoke|gpu] [ONLY='02 04'] [MODEL=hub-id-or-folder] [DEVICE=cpu|cuda]"
	@echo "            [WORKERS=2: tests side by side, 24 GB for two]"
	@echo "            [PYTHON=python3.12] [VENV=path of an environment, made if missing]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

setup: environment assets $(if $(filter bundled/gemma3-270m,$(value MODEL)),gemma)  ## virtual environment, pinned packages, verified model and text

environment:  ## of these the environment alone
	@test -x $(PY) || $(SYSTEM) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.12")'
	@$(ANY) make.py environment $(PLACE)

assets: environment  ## and model and text
	@$(PY) make.py assets $(PLACE)

gemma: environment  ## a second model, Gemma 3 270M, under its own terms of use (238 MB)
	@$(PY) make.py gemma $(PLACE)

figures: setup  ## run every notebook (PROFILE) and draw figures/
	$(RUN)

FORCE:
figures/%.png: FORCE setup  # one figure, by the notebook or study that draws it, with that notebook's others
	$(RUN) --figure $(call quoted,$*)

studies: setup $(if $(value ONLY),$(if $(findstring second_model,$(value ONLY)),gemma),gemma)  ## the measurements that take longer than a notebook may: texts, ingredients, all methods, a second model
	$(RUN) --studies

smoke: PROFILE = smoke
smoke: setup  ## run every notebook and study at its smallest size
	$(RUN)
	$(RUN) --studies

notebooks: setup  ## run the cpu profile and put the executed notebooks in place
	$(PY) notebooks/run.py --publish $(if $(value ONLY),--only $(call listed,$(value ONLY)))

paper: environment  ## set paper/mlpreplace.pdf from figures/, offline
	$(PY) paper/typeset.py

site: environment  ## set site/: notebooks, figures and an explorer of all plans as pages to read, offline
	$(PY) docs/build.py

test: setup lint  ## all tests but the slow ones, the notebooks in the smoke profile among them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(call quoted,$(value WORKERS)) --dist worksteal

lint: environment  ## style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lab: setup  ## JupyterLab on the notebooks
	$(call quoted,$(HOMED)/bin/jupyter) lab --notebook-dir=notebooks $(call listed,$(value LAB))

bench: setup  ## what capture and sweeps cost, and how much faster compressed models are
	$(PY) benchmarks/bench.py

clean:  ## remove executed notebooks, the site and cached results
	@$(ANY) make.py clean

distclean:  ## remove the virtual environment, the assets and the converted model as well
	@$(ANY) make.py distclean $(PLACE)

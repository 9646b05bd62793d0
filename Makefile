# Everything here runs inside .venv, which the first command makes from requirements.lock.
PYTHON ?= python3
LAB_FLAGS ?=
LESSONS ?=
BENCH ?= $(wildcard benchmarks/*.py)

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python
READY := $(VENV)/ready
PIP := $(RUN) -m pip --disable-pip-version-check

# A folder that was moved or copied has a .venv that points to the old place: install again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(shell rm -f $(READY))
endif

.DEFAULT_GOAL := help
.PHONY: help setup lab test test-full course export update exercises format bench lock clean

help: ## show these lines
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(READY) ## make .venv and install everything, once

lab: export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/jupyter/config
lab: export JUPYTER_DATA_DIR := $(CURDIR)/$(VENV)/jupyter/data
lab: export JUPYTER_RUNTIME_DIR := $(CURDIR)/$(VENV)/jupyter/runtime
lab: export IPYTHONDIR := $(CURDIR)/$(VENV)/jupyter/ipython
lab: $(READY) ## open the course in JupyterLab (LAB_FLAGS="--no-browser --port 9000" passes options)
	$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/lessons/00_postcards.ipynb $(LAB_FLAGS)

test: $(READY) ## run every check: format, package in sync, unit tests, lessons, exercises
	@$(RUN) tools/test_all.py

test-full: $(READY) ## compare with other libraries at the published sizes (SDXL: about 15 GB of memory, 14 GB of disk)
	$(RUN) -m pytest -m full tests

course: $(READY) ## run all lessons for real and store their outputs (LESSONS=01_noise for one)
	$(RUN) tools/run_lessons.py $(LESSONS)

export: $(READY) ## write minisd/*.py from the lessons
	@$(RUN) tools/export.py

update: $(READY) ## carry edits made in minisd/*.py back into the lessons
	@$(RUN) tools/export.py --update

exercises: $(READY) ## make the student versions from exercises/source/
	@$(RUN) tools/exercises.py generate

format: $(READY) ## format code and notebooks
	$(RUN) tools/notebooks.py
	$(RUN) -m ruff check --fix-only --quiet .
	$(RUN) -m ruff format .

bench: $(READY) ## run the benchmarks beside other libraries (BENCH=benchmarks/train_step.py for one)
	$(PIP) install --quiet --no-build-isolation --constraint requirements.lock --editable ".[bench]"
	@for file in $(BENCH); do echo "== $$file"; $(RUN) $$file || exit 1; done

lock: ## resolve pyproject.toml anew into requirements.lock (needs uv)
	uv pip compile pyproject.toml --extra lab --extra test --universal --python-version 3.10 --upgrade \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock

clean: ## delete what was made: .venv, build/, caches (not runs/, which holds your trainings)
	rm -rf $(VENV) build minisd.egg-info minisd/_modidx.py .pytest_cache .ruff_cache
	find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("minisd needs Python 3.10 or newer and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) from requirements.lock: once, a few minutes."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "This Python cannot put pip into $(VENV) (no ensurepip); copying its own."; \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip install --quiet --target "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@printf '%s' "$(CURDIR)" > $@

# `make demo` and `make test` set everything up themselves; `make help` lists the rest.
#   PYTHON=python3.11   the interpreter of the virtual environment (3.10 to 3.12; default: the first one found)
#   VENV=.venv          where the virtual environment lies
#   PYTEST_ARGS=...     passed on to pytest
#   LABEL_VENV=DIR, DEPLOY_VENV=DIR   environments of MONAI Label and MONAI Deploy, apart from the project's own
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?=
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin
# Named after what was installed, so that an unchanged environment is known without asking pip or the network.
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | tr ' ' '-')

DEMO := demo
DEMO_CASE := hn_demo
PICTURE := bundle/docs/dose.png

.PHONY: help setup demo bench picture test test-slow lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## the virtual environment with the pinned dependencies

$(STAMP):
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	    for python in $(PYTHON) $(if $(PYTHON),,python3 python3.12 python3.11 python3.10); do \
	        if "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	        then found=$$python; break; fi; \
	    done; \
	    if [ -z "$${found:-}" ]; then \
	        echo "make: found no Python 3.10 to 3.12 (tried: $(or $(PYTHON),python3 python3.12 python3.11 python3.10));" \
	            "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	    fi; \
	    echo "== virtual environment in $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv $(VENV); \
	fi
	@echo "== installing the pinned dependencies (a few minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# rt-utils asks for opencv-python, which wants a desktop's libGL; the headless build of the same version does not.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || \
	    $(BIN)/python -m pip install --no-deps --force-reinstall -c constraints.txt opencv-python-headless
	@rm -f $(VENV)/.installed-* && touch $@

$(DEMO)/data/$(DEMO_CASE): | $(STAMP)
	@echo "== writing the synthetic head-and-neck case as DICOM"
	@rm -rf $(DEMO)/data.part && mkdir -p $(DEMO)/data.part $(DEMO)/data
	$(BIN)/python -m custom.phantom $(DEMO)/data.part --site HeadNeck
	@mv $(DEMO)/data.part/$(DEMO_CASE) $@ && rmdir $(DEMO)/data.part

demo: $(STAMP) | $(DEMO)/data/$(DEMO_CASE)  ## predict the dose of a synthetic head-and-neck case
	@echo "== predicting its dose with MONAI's bundle runner"
	$(BIN)/python -m monai.bundle run inference --config_file bundle/configs/inference.json \
	    --dataset_dir $(DEMO)/data/$(DEMO_CASE) --output_dir $(DEMO)/results
	@set -e; echo "== results in $(DEMO)/results/$(DEMO_CASE)"; \
	for file in RTDOSE.dcm dose.nii.gz report.html report.json; do \
	    path=$(DEMO)/results/$(DEMO_CASE)/$$file; \
	    [ -s "$$path" ] || { echo "make: the run ended without $$path" >&2; exit 1; }; \
	    echo "   $$path"; \
	done

BENCH_DIR ?= $(DEMO)/data/$(DEMO_CASE)
bench: $(STAMP) | $(DEMO)/data/$(DEMO_CASE)  ## where the seconds of a prediction go (BENCH_DIR=cases, default: the demo case)
	$(BIN)/python -m monai.bundle run benchmark \
	    --config_file "['bundle/configs/inference.json','bundle/configs/studies.json']" \
	    --dataset_dir $(BENCH_DIR) --output_dir $(DEMO)/benchmark

picture: demo  ## the README's picture, from the demo's result
	$(BIN)/python apps/picture.py $(DEMO)/data/$(DEMO_CASE) $(DEMO)/results/$(DEMO_CASE) $(PICTURE)

test: $(STAMP)  ## all tests but those marked slow
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests marked slow that need no other environment and no kills: studies, systems, release
	$(BIN)/python -m pytest -m slow tests --ignore tests/faults --ignore tests/bad_input --ignore tests/numbers $(PYTEST_ARGS)

# Model Zoo. SCHEMA: a copy of the zoo's metadata schema; ONLINE=1: may ask the package index; ZOO: a checkout of the
# zoo, whose own verifier is then run too; RELEASE_VENV: where the environment for the trial run is made, and kept;
# RELEASE_PYTHON: its interpreter, by default that of the project.
SCHEMA ?= ../shared/zoo/meta_schema_20240725.json
RELEASE_VENV ?= .venv-release
RELEASE_PYTHON ?= $(abspath $(BIN))/python
RELEASE_TOOLS := $(STAMP)-release
ZOO_OPTIONS = --schema $(SCHEMA) $(if $(ONLINE),--online) $(if $(ZOO),--zoo $(ZOO))

.PHONY: metadata verify release dockerfile

$(RELEASE_TOOLS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[release]'
	@touch $@

metadata: $(STAMP)  ## write the channels of inference.json into metadata.json
	$(BIN)/python -m custom.release metadata

verify: $(RELEASE_TOOLS)  ## the Model Zoo's checks of the bundle (SCHEMA=FILE ONLINE=1 ZOO=CHECKOUT)
	$(BIN)/python -m custom.release verify $(ZOO_OPTIONS)

release: $(RELEASE_TOOLS)  ## dist/<name>_v<version> and its zip, checked, and tried in an environment of its own
	$(BIN)/python -m custom.release release $(ZOO_OPTIONS) --environment $(RELEASE_VENV) --python $(RELEASE_PYTHON)

dockerfile: $(RELEASE_TOOLS)  ## lint the Dockerfile
	$(BIN)/hadolint Dockerfile

FUZZ_INPUTS ?= 5000
FUZZ_SEED ?= 0
FAULT_KILLS ?= 20
AUDIT_VENV ?= .venv-audit
AUDIT := bandit==1.9.4 pip-audit==2.10.1

.PHONY: fuzz faults audit audit-code

fuzz: $(STAMP)  ## damaged bytes for every reader (FUZZ_INPUTS=5000 files a reader, FUZZ_SEED=0)
	FUZZ_INPUTS=$(FUZZ_INPUTS) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz

faults: $(STAMP)  ## kills, a full disk, bad weights, the memory of a large case (FAULT_KILLS=20, a quarter of an hour and more)
	FAULT_KILLS=$(FAULT_KILLS) $(BIN)/python -m pytest -m slow tests/faults tests/bad_input

# Python 3.10 with the oldest pydicom and numpy: the dose must be that of the newest. Its torch brings CUDA along (5 GB).
SECOND_VENV ?= .venv-second
SECOND_PYTHON ?= python3.10
SECOND_STAMP = $(SECOND_VENV)/.installed-$(shell cat pyproject.toml | cksum | tr ' ' '-')

.PHONY: second-env test-second

second-env: $(SECOND_STAMP)  ## an environment with Python 3.10, pydicom 2.4 and numpy 1.26

$(SECOND_STAMP):
	[ -x $(SECOND_VENV)/bin/python ] || $(SECOND_PYTHON) -m venv $(SECOND_VENV)
	$(SECOND_VENV)/bin/python -m pip install --disable-pip-version-check numpy==1.26.4 pydicom==2.4.5 torch==2.13.0 -e .
	@rm -f $(SECOND_VENV)/.installed-* && touch $@

test-second: $(STAMP) $(SECOND_STAMP)  ## the same dose from both environments, twice, in bfloat16 and in windows
	DOSE_SECOND_PYTHON=$(abspath $(SECOND_VENV))/bin/python $(BIN)/python -m pytest -m slow tests/numbers $(PYTEST_ARGS)

$(AUDIT_VENV)/bin/bandit: | $(STAMP)
	$(BIN)/python -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(AUDIT)

audit-code: $(AUDIT_VENV)/bin/bandit  ## bandit over the code; what it leaves is in bundle/docs/safety.md
	$(AUDIT_VENV)/bin/bandit --quiet --recursive custom -ll

audit: audit-code  ## bandit, and the known vulnerabilities of the pinned dependencies (asks PyPI about each)
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

lint: $(STAMP)  ## ruff over the whole tree
	$(BIN)/ruff check .

clean:  ## remove what the targets made, but not the virtual environment
	rm -rf $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find custom tests -name __pycache__ -type d -prune -exec rm -rf {} +

# MONAI Label: its own environment (Python 3.11, apps/label/constraints.txt), its app with the bundle in it, its server.
LABEL_VENV ?= .venv-label
LABEL_APP ?= demo/label
LABEL_STUDIES ?= demo/label-studies
LABEL_PORT ?= 8000
LABEL_PYTHON ?= python3.11
LABEL_STAMP = $(LABEL_VENV)/.installed-$(shell cat apps/label/*.txt pyproject.toml | cksum | tr ' ' '-')

.PHONY: label-env label-server test-label

label-env: $(LABEL_STAMP)  ## MONAI Label's own environment (several GB)

$(LABEL_STAMP):
	[ -x $(LABEL_VENV)/bin/python ] || $(LABEL_PYTHON) -m venv $(LABEL_VENV)
	@# torch first: sam2, which MONAI Label asks for, is built against it.
	$(LABEL_VENV)/bin/python -m pip install -c apps/label/constraints.txt torch torchvision setuptools wheel
	SAM2_BUILD_CUDA=0 $(LABEL_VENV)/bin/python -m pip install --no-build-isolation -c apps/label/constraints.txt \
	    -r apps/label/requirements.txt -e .
	@rm -f $(LABEL_VENV)/.installed-* && touch $@

$(LABEL_APP)/monaibundle: | $(LABEL_STAMP)
	$(LABEL_VENV)/bin/python apps/label/make_app.py app $(LABEL_APP)

# The default zoo_source makes MONAI Label ask the network, and so does sam2, for weights.
label-server: $(LABEL_STAMP) | $(LABEL_APP)/monaibundle  ## MONAI Label's server with this bundle, on this machine only
	@mkdir -p $(LABEL_STUDIES)
	exec $(LABEL_VENV)/bin/python -m monailabel.main start_server --app $(LABEL_APP)/monaibundle \
	    --studies $(LABEL_STUDIES) --host 127.0.0.1 --port $(LABEL_PORT) --conf models rt_ct_dose_prediction \
	    --conf zoo_source local --conf sam2 false --conf skip_trainers true

test-label: $(STAMP) $(LABEL_STAMP)  ## the tests of MONAI Label's server, in its own environment
	DOSE_LABEL_PYTHON=$(abspath $(LABEL_VENV))/bin/python $(BIN)/python -m pytest -m slow tests/test_label.py $(PYTEST_ARGS)

# MONAI Deploy: its own environment (Python 3.11, apps/deploy/constraints.txt), its application, what its packager takes.
DEPLOY_VENV ?= .venv-deploy
DEPLOY_PYTHON ?= python3.11
DEPLOY_MAP ?= demo/deploy
DEPLOY_STAMP = $(DEPLOY_VENV)/.installed-$(shell cat apps/deploy/*.txt pyproject.toml | cksum | tr ' ' '-')

.PHONY: deploy-env deploy-package test-deploy

deploy-env: $(DEPLOY_STAMP)  ## MONAI Deploy's own environment (several GB)

$(DEPLOY_STAMP):
	[ -x $(DEPLOY_VENV)/bin/python ] || $(DEPLOY_PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install -c apps/deploy/constraints.txt -r apps/deploy/requirements.txt holoscan-cli \
	    -e .
	@rm -f $(DEPLOY_VENV)/.installed-* && touch $@

deploy-package: $(DEPLOY_STAMP)  ## the folders that MONAI Deploy's packager takes
	$(DEPLOY_VENV)/bin/python apps/deploy/make_package.py $(DEPLOY_MAP)

test-deploy: $(STAMP) $(DEPLOY_STAMP)  ## the tests of the MONAI Deploy application, in its own environment
	DOSE_DEPLOY_PYTHON=$(abspath $(DEPLOY_VENV))/bin/python $(BIN)/python -m pytest -m slow tests/test_deploy.py $(PYTEST_ARGS)

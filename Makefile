# smallvision: every chore of the repository is a target here. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PROJECTS := gfnet_dynn landmark_distill visiondistill_gc torch_cls_zoo mpkd
GFNET_SETS := aid nasc nwpu patternnet ucm
LANDMARK_RECIPES := resnet12 swin-tiny
ZOO_TABLES := models criteria augment distill curriculum
MPKD_SETS := cifar10 imagenet

# Which Python makes the environment: `make setup PYTHON=python3.12`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do $$p -c "" 2>/dev/null && command -v $$p && break; done)
# Where the data sets lie, how much to run (full, short, rehearsal), and further flags.
DATA_ROOT ?= data
SCALE ?= auto
EXTRA ?=
# Further flags of pytest for `make test`; with COVERAGE=1 the core must be covered to 95 %.
TEST_FLAGS ?= $(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=95)
# FRESH=1 starts a repro target anew instead of going on where it stopped.
FRESH ?=

PY := .venv/bin/python
READY := .venv/.ready
# Threads that hardly spin while they wait: on a busy machine the default makes training many
# times slower.
export GOMP_SPINCOUNT ?= 1000

REPROS := $(GFNET_SETS:%=repro-gfnet-%) $(LANDMARK_RECIPES:%=repro-landmark-%) \
	repro-visiondistill-garbage $(ZOO_TABLES:%=repro-zoo-%) $(MPKD_SETS:%=repro-mpkd-%)

.PHONY: help setup test lint format doctor ledger bench constraints mlflow visualdl tensorboard \
	clean repro $(PROJECTS:%=install-%) $(PROJECTS:%=test-%) test-shared $(REPROS)

help: ## list the targets
	@grep -hE '^[a-z][a-zA-Z0-9_%<>-]*:.*?## ' $(firstword $(MAKEFILE_LIST)) | \
		awk -F ':.*?## ' '{printf "  make %-26s %s\n", $$1, $$2}'
	@echo "  make install-<project>          install one project into its own environment and try it"
	@echo "  make test-<project>             the tests of one project"
	@echo "  projects: $(PROJECTS)"
	@echo "  variables: PYTHON DATA_ROOT=$(DATA_ROOT) SCALE=full|short|rehearsal EXTRA='more flags' FRESH=1"

$(READY): constraints.txt tools/requirements-dev.in shared/pyproject.toml $(PROJECTS:%=packages/%/pyproject.toml)
	@test -n "$(PYTHON)" || { echo "error: no Python found; expected 3.10 to 3.13, name one by PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("error: $(PYTHON) is Python %d.%d, expected 3.10 to 3.13" % v)'
	test -x $(PY) || "$(PYTHON)" -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -r tools/requirements-dev.in \
		-e 'packages/gfnet_dynn[mlflow,export]' -e 'packages/landmark_distill[export,faiss]' \
		-e 'packages/visiondistill_gc[export,serve,notebook]' -e 'packages/torch_cls_zoo[export]' \
		-e 'packages/mpkd[export,openvino]'
	$(PY) -m pip install --disable-pip-version-check --no-deps -e shared
	@touch $(READY)

setup: $(READY) ## make .venv with the versions of constraints.txt
	@echo "environment ready: .venv"

test: $(READY) ## run every test
	$(PY) -m pytest -q $(TEST_FLAGS)

test-shared: $(READY) ## the tests of the shared core, of parity and of the repository's contracts
	$(PY) -m pytest -q tests/shared tests/parity tests/contracts

$(PROJECTS:%=test-%): test-%: $(READY)
	$(PY) -m pytest -q $(wildcard tests/$*) tests/contracts

$(PROJECTS:%=install-%): install-%:
	"$(PYTHON)" tools/project_env.py $*

lint: $(READY) ## ruff (check and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/ledger.py --check

format: $(READY) ## let ruff put the code in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

doctor: $(READY) ## which Python, frameworks, GPU, disk and data sets are here, and what does not fit
	$(PY) tools/doctor.py --data-root "$(DATA_ROOT)"

ledger: $(READY) ## render docs/ledger.md from the claims and records, and check both
	$(PY) tools/ledger.py
	$(PY) tools/ledger.py --check

bench: $(READY) ## run the benchmarks and write docs/benchmarks.md
	$(PY) tools/bench/run.py $(EXTRA)

constraints: $(READY) ## renew constraints.txt
	$(PY) tools/constraints.py

# What every reproduction has in common; FRESH, DATA_ROOT, SCALE and EXTRA come from the caller.
ON := --data-root "$(DATA_ROOT)" --scale "$(SCALE)" $(if $(FRESH),--fresh,--continue) $(EXTRA)

$(GFNET_SETS:%=repro-gfnet-%): repro-gfnet-%: $(READY)
	$(PY) packages/gfnet_dynn/main.py --data-set $* $(ON)

$(LANDMARK_RECIPES:%=repro-landmark-%): repro-landmark-%: $(READY)
	$(PY) packages/landmark_distill/reproduce.py --recipe $* $(ON)

repro-visiondistill-garbage: $(READY) ## MobileNetV2 taught by ResNet50 on garbage, K folds (Paddle)
	$(PY) packages/visiondistill_gc/main.py $(ON)

$(ZOO_TABLES:%=repro-zoo-%): repro-zoo-%: $(READY)
	$(PY) packages/torch_cls_zoo/reproduce.py $* $(ON)

$(MPKD_SETS:%=repro-mpkd-%): repro-mpkd-%: $(READY)
	$(PY) packages/mpkd/reproduce.py $* $(ON)

repro-gfnet-aid: ## GFNet on AID: fine-tune, distil, exits, evaluate (also -nasc -nwpu -patternnet -ucm)
repro-landmark-resnet12: ## ResNet12 through its teacher's frozen head, unseen classes (also -swin-tiny)
repro-zoo-criteria: ## hard-example losses side by side (also -models -augment -distill -curriculum)

repro-mpkd-cifar10: ## precision x distillation x temperature, down to 2 bits (also -imagenet)

repro: $(REPROS) ## every reproduction target

mlflow: $(READY) ## serve the MLflow pages of the runs on http://localhost:5000
	$(PY) -m mlflow ui --backend-store-uri "sqlite:///runs/mlflow.db"

visualdl: $(READY) ## open the VisualDL pages of the Paddle runs on http://localhost:8040
	$(PY) packages/visiondistill_gc/visualdl_page.py $(EXTRA)

tensorboard: $(READY) ## open the TensorBoard pages of the runs on http://localhost:6006
	$(PY) -m tensorboard.main --logdir runs --port 6006 $(EXTRA)

clean: ## remove the environments and caches; runs/ and data/ stay
	rm -rf .venv .envs .cache .pytest_cache .mypy_cache .ruff_cache .coverage
	find packages shared tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# smallvision: every chore of the repository is a target here. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PROJECTS := gfnet_dynn landmark_distill visiondistill_gc torch_cls_zoo mpkd
GFNET_SETS := aid nasc nwpu patternnet ucm
LANDMARK_RECIPES := resnet12 swin-tiny lite0
ZOO_TABLES := models criteria augment distill curriculum
MPKD_SETS := cifar10 imagenet

# Which Python makes the environment: `make setup PYTHON=python3.12`.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do $$p -c "" 2>/dev/null && command -v $$p && break; done)
endif
# `make compare`: a folder of class folders, what the winner must keep to, how long it may take.
DATA ?=
BUDGET ?=
MINUTES ?=
# Where the data sets lie, how much to run (full, short, rehearsal), and further flags.
DATA_ROOT ?= data
SCALE ?= auto
EXTRA ?=
# Further flags of pytest for `make test`; with COVERAGE=1 the core must be covered to 95 %.
TEST_FLAGS ?= $(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=95)
# FRESH=1 starts a repro target anew instead of going on where it stopped.
FRESH ?=

# Another build of torch and torchvision (CPU only, another CUDA): the index that PyTorch's
# installation page names for it.
TORCH_INDEX ?=
# Processes that run tests.
WORKERS ?= 2
# ONLY=1: `make test-<project>` in that project's own environment (`make setup-<project>`).
ONLY ?=

PY := .venv/bin/python
READY := .venv/.ready
# mypy and ruff need little: where the whole environment is not there, they get a small one.
LINT_READY = $(if $(wildcard $(READY)),$(READY),.venv-lint/.ready)
LINT_PY = $(dir $(LINT_READY))bin/python
PIP_FLAGS := --disable-pip-version-check -c constraints.txt
EXTRAS_gfnet_dynn := [mlflow,export]
EXTRAS_landmark_distill := [export,faiss]
EXTRAS_visiondistill_gc := [export,serve,notebook]
EXTRAS_torch_cls_zoo := [export]
EXTRAS_mpkd := [export,openvino]
# Threads that hardly spin while they wait: on a busy machine the default makes training many
# times slower.
export GOMP_SPINCOUNT ?= 1000
# One thread a test process: two of them share two cores.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n $(WORKERS) --dist loadscope

REPROS := $(GFNET_SETS:%=repro-gfnet-%) $(LANDMARK_RECIPES:%=repro-landmark-%) \
	repro-visiondistill-garbage $(ZOO_TABLES:%=repro-zoo-%) $(MPKD_SETS:%=repro-mpkd-%)

.PHONY: help compare setup test test-slow test-compare mutants lint format doctor house ledger bench \
	constraints wheels setup-paddleclas paddleclas-python test-paddleclas mlflow visualdl tensorboard clean repro $(REPROS) test-shared \
	$(PROJECTS:%=install-%) $(PROJECTS:%=setup-%) $(PROJECTS:%=test-%)

help: ## list the targets
	@grep -hE '^[a-z][a-zA-Z0-9_%<>-]*:.*?## ' $(firstword $(MAKEFILE_LIST)) | \
		awk -F ':.*?## ' '{printf "  make %-26s %s\n", $$1, $$2}'
	@echo "  make setup-<project>            .venv-<project>: what one project needs, and no more"
	@echo "  make install-<project>          install one project into its own environment and try it"
	@echo "  make test-<project>             the tests of one project"
	@echo "  projects: $(PROJECTS)"
	@echo "  variables: PYTHON DATA_ROOT=$(DATA_ROOT) SCALE=full|short|rehearsal EXTRA='more flags' FRESH=1"
	@echo "             DATA=images BUDGET='ms<=5 mb<=4' MINUTES=30 (compare)"
	@echo "             TORCH_INDEX=... (setup) WORKERS=$(WORKERS) ONLY=1 (test-<project>)"

# $(call environment,FOLDER): a virtual environment, with the wanted build of torch where one is named.
define environment
	@test -n "$(PYTHON)" || { echo "error: no Python found; expected 3.10 to 3.13, name one by PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("error: $(PYTHON) is Python %d.%d, expected 3.10 to 3.13" % v)'
	test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1)
	$(if $(TORCH_INDEX),$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps --index-url "$(TORCH_INDEX)" torch torchvision)
endef

$(READY): constraints.txt tools/requirements-dev.in shared/pyproject.toml $(PROJECTS:%=packages/%/pyproject.toml)
	$(call environment,.venv)
	$(PY) -m pip install $(PIP_FLAGS) -r tools/requirements-dev.in \
		$(foreach p,$(PROJECTS),-e 'packages/$(p)$(EXTRAS_$(p))')
	$(PY) -m pip install --disable-pip-version-check --no-deps -e shared
	@touch $(READY)

.venv-lint/.ready: constraints.txt tools/requirements-lint.in
	$(call environment,.venv-lint)
	.venv-lint/bin/python -m pip install $(PIP_FLAGS) -r tools/requirements-lint.in
	@touch $@

$(PROJECTS:%=.venv-%/.ready): .venv-%/.ready: constraints.txt tools/requirements-test.in shared/pyproject.toml packages/%/pyproject.toml
	$(call environment,.venv-$*)
	.venv-$*/bin/python -m pip install $(PIP_FLAGS) -r tools/requirements-test.in -e 'packages/$*$(EXTRAS_$*)'
	.venv-$*/bin/python -m pip install --disable-pip-version-check --no-deps -e shared
	@touch $@

# paddleclas pins NumPy 1.24.4 and OpenCV 4.6: an environment of its own, Python 3.10 or 3.11, without constraints.txt.
PADDLECLAS_PYTHON ?= $(shell for p in python3.11 python3.10 python3 python; do "$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null && echo "$$p" && break; done)

.venv-paddleclas/.ready: shared/pyproject.toml packages/visiondistill_gc/pyproject.toml
	@test -n "$(PADDLECLAS_PYTHON)" || { echo "error: paddleclas needs Python 3.10 or 3.11; name one by PADDLECLAS_PYTHON=" >&2; exit 1; }
	test -x .venv-paddleclas/bin/python || "$(PADDLECLAS_PYTHON)" -m venv .venv-paddleclas
	.venv-paddleclas/bin/python -m pip install --disable-pip-version-check "./packages/visiondistill_gc[paddleclas,export]" pytest
	@touch $@

paddleclas-python:
	@echo "$(PADDLECLAS_PYTHON)"

setup-paddleclas: .venv-paddleclas/.ready ## .venv-paddleclas: visiondistill_gc with PaddleClas' networks (Python 3.10 or 3.11)
	@echo "environment ready: .venv-paddleclas"

test-paddleclas: .venv-paddleclas/.ready ## visiondistill_gc's tests with PaddleClas, in its environment
	.venv-paddleclas/bin/python -m pytest -m "" tests/visiondistill_gc/test_vgc_paddleclas.py

setup: $(READY) ## make .venv with the versions of constraints.txt (TORCH_INDEX=... for another torch)
	@echo "environment ready: .venv"

$(PROJECTS:%=setup-%): setup-%: .venv-%/.ready
	@echo "environment ready: .venv-$*"

test: $(READY) ## run every test but the long ones
	$(PYTEST) $(TEST_FLAGS)

test-slow: $(READY) ## what is long by nature: kill loops, full trainings in several processes
	$(PYTEST) -m slow $(TEST_FLAGS)

test-shared: $(READY) ## the tests of the shared core, of parity and of the repository's contracts
	$(PYTEST) tests/shared tests/parity tests/contracts

test-compare: $(READY) ## the tests of the journey of make compare
	$(PYTEST) tests/compare

.SECONDEXPANSION:
$(PROJECTS:%=test-%): PY = $(if $(ONLY),.venv-$(@:test-%=%),.venv)/bin/python
$(PROJECTS:%=test-%): test-%: $$(if $$(ONLY),.venv-$$*/.ready,$$(READY))
	$(PYTEST) tests/$*

mutants: $(READY) ## put each fault of tests/mutants.yaml into a copy: its tests must fail
	$(PY) tools/mutants.py $(EXTRA)

$(PROJECTS:%=install-%): install-%:
	"$(PYTHON)" tools/project_env.py $*

wheels: $(READY) ## wheels and sources in dist/ that install anywhere, without this checkout
	$(PY) tools/wheels.py

lint: $$(LINT_READY) ## ruff (check and format), mypy, the ledger
	$(LINT_PY) -m ruff check .
	$(LINT_PY) -m ruff format --check .
	$(LINT_PY) -m mypy
	$(LINT_PY) tools/ledger.py --check

house: ## count files, lines, imports and import circles of every part
	@"$(PYTHON)" tools/house.py

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
repro-landmark-resnet12: ## ResNet12 through its teacher's frozen head, unseen classes (also -swin-tiny -lite0)
repro-zoo-criteria: ## hard-example losses side by side (also -models -augment -distill -curriculum)

repro-mpkd-cifar10: ## precision x distillation x temperature, down to 2 bits (also -imagenet)

repro: $(REPROS) ## every reproduction target

compare: $(READY) ## the smallest model that is good enough: make compare DATA=images BUDGET="ms<=5 mb<=4"
	$(PY) tools/compare/main.py $(if $(DATA),--data-path "$(DATA)") $(if $(BUDGET),--budget "$(BUDGET)") \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(FRESH),--fresh,--continue) $(EXTRA)

mlflow: $(READY) ## serve the MLflow pages of the runs on http://localhost:5000
	$(PY) -m mlflow ui --backend-store-uri "sqlite:///runs/mlflow.db"

visualdl: $(READY) ## open the VisualDL pages of the Paddle runs on http://localhost:8040
	$(PY) packages/visiondistill_gc/visualdl_page.py $(EXTRA)

tensorboard: $(READY) ## open the TensorBoard pages of the runs on http://localhost:6006
	$(PY) -m tensorboard.main --logdir runs --port 6006 $(EXTRA)

clean: ## remove the environments and caches; runs/ and data/ stay
	rm -rf .venv .venv-* .envs dist .cache .pytest_cache .mypy_cache .ruff_cache .coverage
	find packages shared tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# make setup   create the environment (.venv)
# make demo    run the whole demo: data, weights, training, evaluation, registration; 8 to 25 minutes on 2 cores
# make test    run the fast tests (one file: make test TESTS=tests/cli/test_config.py; on more cores: JOBS=8)
# make test-slow  run the slow tests (end-to-end pipelines, process kills, real servers); up to 20 minutes on 2 cores
# make test-all   run all tests
# make ui      start the MLflow UI with the demo's runs and models
# make image   build the images vitdet and vitdet-mlflow with docker, podman or buildah (the first that responds, or
#              ENGINE=podman); make image REGISTRY=registry.example.com/ TAG=0.2.0 OPTIONS="--build-arg BASE=..."
# make lint    run ruff and mypy
# make lock    update requirements.lock to the newest versions that pyproject.toml allows
# make clean   remove the environment, the work folder, DVC's cache and lock, and the caches of the tools
#
# All targets except image and clean first create the environment (.venv) if it is missing or older than requirements.lock
# or pyproject.toml. To use another interpreter for a new .venv: make demo PYTHON=python3.12

PYTHON ?= python3
PORT ?= 5000
TESTS ?= tests
JOBS ?= 2
WORK := work
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo check-git test test-slow test-all ui image lint lock setup clean

demo: check-git $(READY)
	dvc repro
	dvc exp save --quiet --force --name demo
	@python -c "$$SUMMARY" $(WORK)

# DVC records the demo's experiment in Git. This check runs before the slow installation of the environment.
check-git:
	@git rev-parse --verify HEAD >/dev/null || { echo "make demo needs a Git repository with a commit, as DVC records the experiment in Git (see Git's message above); \
	use git clone, or run here: git init && git add --all && git commit --message start" >&2; exit 1; }

ifneq ($(filter demo,$(or $(MAKECMDGOALS),demo)),)
$(READY): | check-git
endif

# Run the tests of a file in one process, so that module fixtures are created once.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(READY)
	$(PYTEST) -m slow $(TESTS)

test-all: $(READY)
	$(PYTEST) $(TESTS)

ui: $(READY)
	@test -f $(WORK)/mlflow.db || { echo "$(WORK)/mlflow.db is missing: run make demo first" >&2; exit 1; }
	@echo "MLflow at http://127.0.0.1:$(PORT)/#/experiments/1?workflowType=machine_learning until Ctrl-C; for another port: make ui PORT=5001"
	mlflow server --backend-store-uri sqlite:///$(WORK)/mlflow.db --artifacts-destination $(WORK)/mlartifacts \
	  --host 127.0.0.1 --port $(PORT) --workers 1

ENGINE ?= $(shell for engine in docker podman buildah; do $$engine info >/dev/null 2>&1 && echo $$engine && break; done)
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# options for podman and buildah; docker finds the ignore file by name and always caches layers
LAYERS := --layers --ignorefile manifests/image/Dockerfile.dockerignore

image:
	@test -n "$(ENGINE)" || { echo "make image needs docker, podman or buildah, but none of them responds to \`info\`: \
	install or start one, or pass its path: make image ENGINE=..." >&2; exit 1; }
	revision=$$(git describe --always --dirty --abbrev=40 --exclude='*' || true); for target in vitdet mlflow; do \
	  $(ENGINE) build $(if $(filter docker,$(notdir $(ENGINE))),,$(LAYERS)) $(OPTIONS) --file manifests/image/Dockerfile --target $$target \
	    --build-arg REVISION=$$revision --tag $(REGISTRY)vitdet$$([ $$target = vitdet ] || echo -$$target):$(TAG) . || exit 1; \
	done
	@echo "built $(REGISTRY)vitdet:$(TAG) and $(REGISTRY)vitdet-mlflow:$(TAG)"

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

lock: $(READY)
	uv pip compile --no-config --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --index-strategy unsafe-best-match --no-emit-index-url --no-emit-find-links --extra dev \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): command not found; pass a Python interpreter: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vitdet requires Python >= 3.11, but $(PYTHON) is $$($(PYTHON) -V); pass another interpreter: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot create virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv $(WORK) .dvc/cache .dvc/tmp dvc.lock build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

define SUMMARY
import json, pathlib, sys
from vitdet.cli.evaluate import table
work = pathlib.Path(sys.argv[1])
metrics = json.loads((work / "metrics.json").read_text())
model = json.loads((work / "registered.json").read_text())
print("", table(metrics), sep="\n")
print(f"\npictures     {work / 'pictures'}")
print(f"model        {model['name']}, version {model['version']}")
print("all metrics  make ui")
endef
export SUMMARY

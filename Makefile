# Everything a developer or newcomer types. `make help` lists it.

# Debian's python3 first: another interpreter may be named, e.g. make test PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Versions the tests ran with; an entry of your own for torch, e.g. a CPU build's index, goes into pip's
# ordinary configuration.
CONSTRAINTS := packaging/constraints.txt

.DEFAULT_GOAL := help
.PHONY: docs house help demo test test-farm farm test-deb test-fleet cuda-build cuda-deb lint bench gpu-check soak chaos fuzz check venv clean deb lock \
  apt-repo apt-promote apt-withdraw release

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) ## Make a dozen pictures with torch: studio, service and all (KEEP=1 leaves them running)
	$(BIN)/studio-worker demo $(if $(KEEP),--keep)

test: $(STAMP) ## Run the whole test suite (no root needed)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-farm: $(STAMP) ## The local studio's tests on PostgreSQL, and those of S3 (installs Debian's servers, as root)
	packaging/test-farm

farm: $(STAMP) ## A farm in simulation: 200 workers, 20,000 jobs, everything fails (SEED=1; about 20 minutes)
	packaging/test-farm simulation --seed $(or $(SEED),1)

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Measure, beside a peer in the same run; prints ratios
	$(BIN)/python -m tests.bench.service
	$(BIN)/python -W ignore -m tests.bench.engine
	$(BIN)/python -W ignore -m tests.bench.second_job
	$(BIN)/python -W ignore -m tests.bench.cpu
	$(BIN)/python -m tests.bench.download
	$(BIN)/python -m tests.bench.loop
	$(BIN)/python -m tests.bench.lanes
	$(BIN)/python -m tests.bench.heartbeats

# With the packages of the environment above where it was made, else with those of $(PYTHON), whose torch may
# have CUDA.
gpu-check: ## Prove on this box's GPU what only a GPU can: 8 minutes at most, a table and gpu-check.json
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m studio_worker gpu-check

soak: $(STAMP) ## 300 jobs in one process, models and LoRAs in turn: does its memory grow? (about 5 minutes)
	$(BIN)/python -W ignore -m tests.bench.soak

chaos: $(STAMP) ## Soak: 500 jobs while studio, network and worker fail 110 times (SEED=1; about 15 minutes)
	$(BIN)/python -m tests.chaos.soak --seed $(or $(SEED),1)

fuzz: $(STAMP) ## Feed what reads from outside odd input (SECONDS=600 each of 6; TARGET=bundles alone)
	$(BIN)/python -m tests.fuzz.run $(TARGET) --seconds $(or $(SECONDS),600) --seed $(or $(SEED),1)

house: $(STAMP) ## Draw the package from its imports: rooms, floors, arrows, what is too large
	$(BIN)/python -m tests.house

docs: $(STAMP) ## Renew config.toml, man pages and shell completions from what the program declares
	$(BIN)/python packaging/docs/make.py

deb: ## Build the Debian packages into build/packages (torch's CPU build; see debian/rules for CUDA)
	rm -rf build/packages && mkdir -p build/packages/studio-worker
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -P -t build/packages/studio-worker
	cd build/packages/studio-worker && dpkg-buildpackage -us -uc -b
	rm -rf build/packages/studio-worker
	@ls -l build/packages/*.deb

# docs/releasing.md says how they are used. The key is one of GNUPGHOME's; two of them while they change.
PACKAGES = build/packages
APT_SUITE = candidate
APT = $(PYTHON) packaging/apt/repository.py $(call given,REPO) $(foreach key,$(call given,KEY),--key $(key))
given = $(or $($(1)),$(error say $(1)=...: see docs/releasing.md))

apt-repo: ## Put the packages into a signed apt repository (REPO=FOLDER URL=ADDRESS KEY=FINGERPRINT APT_SUITE=candidate)
	keyring=$$(mktemp -d) && trap 'rm -r "$$keyring"' EXIT && \
	$(PYTHON) packaging/apt/keyring.py "$$keyring" --address $(call given,URL) \
	  $(foreach key,$(call given,KEY),--key $(key)) $(if $(KEYRING_VERSION),--version $(KEYRING_VERSION)) && \
	$(APT) add $(APT_SUITE) $(PACKAGES)/*.deb "$$keyring"/*.deb

apt-promote: ## What the repository's candidate suite has becomes stable (REPO=FOLDER KEY=FINGERPRINT)
	$(APT) promote

apt-withdraw: ## Take a version out of a suite (REPO KEY APT_SUITE, PACKAGE=studio-worker VERSION=...)
	$(APT) withdraw $(APT_SUITE) $(call given,PACKAGE) $(call given,VERSION)

# It builds everything twice; DEB_BUILD_PROFILES says what everything is.
release: ## Make a release: check, build twice, describe, sign (VERSION=... KEY=FINGERPRINT, or UNSIGNED=1)
	/usr/bin/python3.11 packaging/release/release.py $(call given,VERSION) $(if $(KEY),--key $(firstword $(KEY))) \
	  $(if $(UNSIGNED),--unsigned)

test-fleet: $(STAMP) ## The Ansible role and cloud-init's example in booted machines (as root, after make deb)
	FLEET=1 $(BIN)/python -m pytest --timeout=900 tests/acceptance/test_deb_fleet.py

test-deb: $(STAMP) ## Build the packages and check them in a booted Debian (as root; SUITE="bookworm trixie:short")
	packaging/test-deb

cuda-build: $(STAMP) ## Install torch's CUDA build (5 GB, once) and check all that needs no GPU (minutes)
	packaging/test-cuda

cuda-deb: $(STAMP) ## Build the package of torch's CUDA build (2.5 GB) and check it in a booted machine (as root; half an hour)
	DEB_BUILD_PROFILES="pkg.studio-worker.cuda pkg.studio-worker.nocpu" packaging/test-deb -k cuda_package

lock: $(STAMP) ## Renew packaging/lock: versions and hashes of what goes into the packages (LOCKS=torch-cuda12: one)
	$(BIN)/python packaging/lock/lock.py $(LOCKS)

check: lint test ## lint and test

venv: $(STAMP) ## Make the virtual environment and install everything into it

# Debian keeps ensurepip in a package of its own; where it is missing it is installed if that is possible.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "python3-venv is missing: installing it"; \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -yq python3-venv; \
	  elif command -v sudo >/dev/null; then sudo apt-get update -q && sudo apt-get install -yq python3-venv; \
	  else echo "run as root: apt-get install python3-venv" >&2; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the other libraries (a few minutes, once)"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

clean: ## Remove what was made here (not the pictures under demo/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` need nothing but Python 3.11+ and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TWINS := weights/tiny/.ready
TRITON := $(VENV)/triton
KERNELS := $(TRITON)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# In pip's place, which does it on one core. It fails where a package holds a file that is no Python; nobody imports those.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null

.PHONY: setup twins kernels demo test check docs soak chaos image release coverage clean lock audit sbom

setup: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): builder/requirements.txt builder/requirements-dev.txt | $(BIN)/python
	$(PIP) --no-compile torch==$$(sed -n 's/^torch==//p' builder/requirements.txt)
	$(COMPILE) & $(PIP) --no-compile -r builder/requirements-dev.txt
	$(COMPILE) || true
	touch $@

twins: $(TWINS)

BAKES := $(addprefix engine/,$(addsuffix .py,bake convert eight_bits linear8 lora lora_keys parts profile profiles \
         profiles_sdxl profiles_wan published stack tensorfile tokenizer twin_tokenizers twin_weights twins weights))

$(TWINS): $(READY) download_weights.py $(BAKES) $(wildcard engine/published/*.json)
	$(BIN)/python download_weights.py --tiny --output weights/tiny
	touch $@

# By itself, outside the environment: see the file of requirements.
kernels: $(KERNELS)

$(KERNELS): builder/requirements-kernels.txt | $(BIN)/python
	rm -rf $(TRITON)
	$(PIP) --no-deps --target $(TRITON) -r builder/requirements-kernels.txt
	touch $@

demo: $(TWINS)
	WORKER_WEIGHTS_DIR=weights/tiny $(BIN)/python examples/demo.py

# Two at a time, then in a process of their own those that own its output or measure its end. The log first: a library that
# is imported later would set up its own. They mostly wait, so beside them the card's kernels are tested, in the only
# processes that have Triton.
ALONE := tests/engine/test_log.py tests/apps
FAST := -m "not soak and not gpu"

test: $(TWINS) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) -n 2 --dist loadfile $(addprefix --ignore ,$(ALONE))
	$(MAKE) --jobs 2 --output-sync test-alone test-kernels

.PHONY: test-alone test-kernels
test-alone:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) $(ALONE)

test-kernels:
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python builder/generate_docs.py --check

docs: $(READY)
	$(BIN)/python builder/generate_docs.py

# The long forms, half an hour each on two cores; both print their figures at the end.
soak: $(TWINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --timeout 1800 --ignore tests/chaos

# All faults at random: make chaos MINUTES=5 SEED=2
chaos: $(TWINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/chaos --chaos-minutes $(or $(MINUTES),20) --chaos-seed $(or $(SEED),1)

image: test check
	docker build --platform linux/amd64 --build-arg PROFILES=$(or $(PROFILES),sdxl) -t worker:latest .

# What others are to run must not float: the base image is named by its digest (docker buildx imagetools inspect
# prints it), and every repository of weights is in the lock file.
release: pinned test check
	docker build --platform linux/amd64 --build-arg BASE=$(BASE) --build-arg PROFILES=$(or $(PROFILES),sdxl) \
	  --build-arg BAKE=--require-lock -t worker:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) .

.PHONY: pinned
pinned:
	@echo '$(BASE)' | grep -Eq '@sha256:[0-9a-f]{64}$$' || \
	  { echo 'release: name the base image by digest: make release BASE=NAME:TAG@sha256:...' >&2; exit 1; }
	@test -f builder/weights.lock.json || \
	  { echo 'release: no builder/weights.lock.json; python download_weights.py --lock writes it' >&2; exit 1; }

# Online, from pip's and uv's own default index; metadata only, nothing of it is installed. What is locked already stays
# as it is: NEWER=--upgrade takes the newest that the requirements allow.
LOCKED := builder/requirements.lock
TOOLS := build/tools

$(TOOLS)/.ready: builder/requirements-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -r builder/requirements-tools.txt
	touch $@

lock: $(TOOLS)/.ready
	$(TOOLS)/bin/uv pip compile builder/requirements.txt --output-file $(LOCKED) --generate-hashes --quiet $(NEWER) \
	  --only-binary :all: --python-platform x86_64-manylinux_2_28 --python-version 3.11 --custom-compile-command 'make lock'
	$(BIN)/python builder/list_licences.py

# Online: the index's advisories on every locked package. --strict: a package that could not be asked about fails too.
audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --strict --requirement $(LOCKED) --require-hashes --disable-pip --progress-spinner off

# Of the environment it runs in. The image makes its own: /worker/sbom.cdx.json.
sbom: $(READY)
	$(BIN)/python builder/write_sbom.py --weights $(or $(WEIGHTS),weights/baked) --output build/sbom.cdx.json

coverage: $(TWINS)
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=term-missing

clean:
	rm -rf $(VENV) weights/tiny output outbox build

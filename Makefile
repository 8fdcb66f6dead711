# `make demo` and `make test` need nothing but Python 3.11+ and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TWINS := weights/tiny/.ready

.PHONY: setup twins demo test check docs soak image coverage clean

setup: $(READY)

$(READY): builder/requirements.txt builder/requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' builder/requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r builder/requirements-dev.txt
	touch $@

twins: $(TWINS)

BAKES := $(addprefix engine/,$(addsuffix .py,bake convert lora lora_keys parts profile profiles profiles_sdxl profiles_wan \
         published tensorfile twin_tokenizers twin_weights twins weights))

$(TWINS): $(READY) download_weights.py $(BAKES) $(wildcard engine/published/*.json)
	$(BIN)/python download_weights.py --tiny --output weights/tiny
	touch $@

demo: $(TWINS)
	WORKER_WEIGHTS_DIR=weights/tiny $(BIN)/python examples/demo.py

# Two at a time, then by themselves those that own the process's output or measure its end. The log first: a library that is
# imported later would set up its own.
ALONE := tests/engine/test_log.py tests/apps
FAST := -m "not soak and not gpu"

test: $(TWINS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST) -n 2 --dist loadfile $(addprefix --ignore ,$(ALONE))
	$(BIN)/python -m pytest $(FAST) $(ALONE)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python builder/generate_docs.py --check

docs: $(READY)
	$(BIN)/python builder/generate_docs.py

soak: $(TWINS)
	$(BIN)/python -m pytest -m soak --timeout 1800

image: test check
	docker build --platform linux/amd64 --build-arg PROFILES=$(or $(PROFILES),sdxl) -t worker:latest .

coverage: $(TWINS)
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=term-missing

clean:
	rm -rf $(VENV) weights/tiny output outbox build

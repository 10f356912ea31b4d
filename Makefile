# make demo   trains a small Qwen3-VL-MoE from scratch and asks it about pictures it has never seen
# make test   lints and runs the tests
# make bench  times us beside transformers, and draws how cost grows: a quarter of an hour on an idle machine
# make test-npu     runs the NPU's code on the real torch_npu and an emulated device: needs gcc, no NPU
# make test-oldest  runs both with the oldest Python and torch that must work: several GB to install
# All but the last make their environment in .venv, with the first Python >= 3.10 found. PIP_FLAGS goes to every pip install.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
OLDEST_PYTHON ?= python3.10
PIP_FLAGS ?=
TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
export TOKENIZERS_PARALLELISM := false
export PIP_FLAGS

.PHONY: demo test bench test-npu test-oldest test-slow lint clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	.venv/bin/python tools/demo.py

test: lint
	.venv/bin/python -m pytest -q

bench: .venv/.test
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/generation.py
	.venv/bin/python benchmarks/preprocessing.py
	.venv/bin/python benchmarks/options.py
	.venv/bin/python benchmarks/growth.py --plot docs/growth.png

test-npu: .venv/.test
	npu=$$(.venv/bin/python tests/npu/stub.py) && env $$npu .venv/bin/python -m pytest -q tests/npu

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest -q
	npu=$$(.venv-oldest/bin/python tests/npu/stub.py) && env $$npu .venv-oldest/bin/python -m pytest -q tests/npu

test-slow: .venv/.test .venv-4.57/.test
	.venv-4.57/bin/python -m pytest -q tests/test_model.py
	TRANSFORMERS_4_PYTHON=$(abspath .venv-4.57/bin/python) .venv/bin/python -m pytest -q -m slow

lint: .venv/.test
	.venv/bin/ruff check .

clean:
	rm -rf .venv .venv-4.57 .venv-oldest .npu demo_out

.venv/.demo: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[plots]"
	touch $@

.venv/.test: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[test]"
	touch $@

# The oldest transformers with Qwen3-VL, to check that what we write loads there too. Its video processor wants
# torchvision; that is kept aside, as one that was built for another torch would break every import of transformers.
.venv-4.57/.test: pyproject.toml | .venv-4.57/bin/pip
	.venv-4.57/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[video]" transformers==4.57.6 pytest
	.venv-4.57/bin/pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv-4.57/torchvision $(TORCHVISION)
	touch $@

.venv-oldest/bin/pip: PYTHON := $(OLDEST_PYTHON)
.venv-oldest/.test: pyproject.toml | .venv-oldest/bin/pip
	.venv-oldest/bin/pip install $(PIP_FLAGS) torch==2.7.1 -e ".[test]"
	touch $@

# Debian's Python has no ensurepip without the python3-venv package: there pip installs itself from outside.
%/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 found; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $* 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $* && $(PYTHON) -m pip --python $*/bin/python install $(PIP_FLAGS) pip; }

# make demo         train a small Qwen3-VL-MoE from scratch and ask it about images that it has never seen
# make test         run the tests, then lint
# make lint         ruff, and mypy on the eight files
# make bench        compare speed and memory with transformers and plot how cost grows (a quarter of an hour); with a
#                   GPU, compare with transformers and measure MFU, recompute and offload there (under ten minutes)
# make test-cuda    run the tests that need a GPU and the self-check, with PYTHON and its packages: installs nothing
# make test-npu     run the NPU's code with the released torch_npu on an emulated device: needs gcc, no NPU
# make test-slow    run the slow tests and a second environment with transformers 4.57
# make test-oldest  run test and test-npu with the oldest supported Python and torch: installs several GB
# make clean        remove the environments and the demo's output
#
# The targets install what they need in .venv (test-oldest: in .venv-oldest), with the first Python >= 3.10 found.
# PIP_FLAGS is passed to every pip install. test-cuda and bench also run on a GPU machine that already has torch,
# transformers, tokenizers, Pillow and pytest:
#
#     make test-cuda PYTHON=python3
#     make bench BENCH_PYTHON=python3

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
OLDEST_PYTHON ?= python3.10
BENCH_PYTHON ?= .venv/bin/python
PIP_FLAGS ?=
TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
export TOKENIZERS_PARALLELISM := false
export PIP_FLAGS

.PHONY: demo test lint bench bench-cpu bench-gpu test-cuda test-npu test-slow test-oldest clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	.venv/bin/python tools/demo.py

test: .venv/.test
	.venv/bin/python -m pytest -q -n 2 --dist loadfile
	$(MAKE) lint

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: $(if $(filter .venv/%,$(BENCH_PYTHON)),.venv/.test)
	device=$$($(BENCH_PYTHON) -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")') && \
		$(MAKE) bench-$$device

bench-cpu:
	$(BENCH_PYTHON) benchmarks/training.py
	$(BENCH_PYTHON) benchmarks/generation.py
	$(BENCH_PYTHON) benchmarks/preprocessing.py
	$(BENCH_PYTHON) benchmarks/options.py
	$(BENCH_PYTHON) benchmarks/growth.py --plot docs/growth.png

# one failure does not hide the figures of the programs after it
bench-gpu:
	status=0; \
	$(BENCH_PYTHON) benchmarks/gpu.py || status=1; \
	$(BENCH_PYTHON) benchmarks/training.py --rounds 5 --only dense-equal,dense-mixed,moe-mixed,memory || status=1; \
	$(BENCH_PYTHON) benchmarks/generation.py --rounds 5 --only dense-1,moe-16 || status=1; \
	exit $$status

test-cuda:
	$(PYTHON) -m pytest -q -m cuda tests/test_cuda.py
	$(PYTHON) kernels_npu.py --device cuda

test-npu: .venv/.test
	npu=$$(.venv/bin/python tests/npu/stub.py) && env $$npu .venv/bin/python -m pytest -q tests/npu

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest -q
	npu=$$(.venv-oldest/bin/python tests/npu/stub.py) && env $$npu .venv-oldest/bin/python -m pytest -q tests/npu

test-slow: .venv/.test .venv-4.57/.test
	.venv-4.57/bin/python -m pytest -q tests/test_model.py
	TRANSFORMERS_4_PYTHON=$(abspath .venv-4.57/bin/python) .venv/bin/python -m pytest -q -m slow

clean:
	rm -rf .venv .venv-4.57 .venv-oldest .npu demo_out

.venv/.demo: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[plots]"
	touch $@

.venv/.test: pyproject.toml | .venv/bin/pip
	.venv/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[test]"
	touch $@

# The oldest transformers with Qwen3-VL, to check that our files load there too. Its video processor needs torchvision.
# torchvision gets a folder of its own, because one built for another torch breaks every import of transformers.
.venv-4.57/.test: pyproject.toml | .venv-4.57/bin/pip
	.venv-4.57/bin/pip install $(PIP_FLAGS) $(TORCH) -e ".[video]" transformers==4.57.6 pytest
	.venv-4.57/bin/pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv-4.57/torchvision $(TORCHVISION)
	touch $@

.venv-oldest/bin/pip: PYTHON := $(OLDEST_PYTHON)
.venv-oldest/.test: pyproject.toml | .venv-oldest/bin/pip
	.venv-oldest/bin/pip install $(PIP_FLAGS) torch==2.7.1 -e ".[test]"
	touch $@

# Debian's Python has no ensurepip without the package python3-venv. There, pip installs itself from outside.
%/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.10 found; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $* 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $* && $(PYTHON) -m pip --python $*/bin/python install $(PIP_FLAGS) pip; }

